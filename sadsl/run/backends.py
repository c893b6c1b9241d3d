"""The backends, and which of them a call runs on."""

from typing import Any

import jax

from pallas_kernels import dispatch

IMPLS = ("reference", *dispatch.BACKENDS)
# The platforms on which each backend runs.
PLATFORMS = {"xla": ("cpu", "gpu", "tpu"), "tpu": ("tpu",), "triton": ("gpu",)}
# The backend of each platform, if the call names none.
DEFAULT_IMPL = {"cpu": "xla", "tpu": "tpu", "gpu": "triton"}


def choose_impl(impl: str | None, interpret: Any, *arrays: Any) -> str:
    """The backend of a call: ``impl``, or that of the default device if None.

    Args:
      impl: the name that the caller gave, or None.
      interpret: whether kernels run in an interpreter, which works on any device.
      *arrays: the arrays of the call; the device is checked unless one is traced.

    Raises:
      ValueError: no backend has this name, or it cannot run on the default device.
    """
    if impl is None:
        impl = DEFAULT_IMPL.get(jax.default_backend(), "xla")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be None or one of {', '.join(IMPLS)}")
    concrete = not any(isinstance(x, jax.core.Tracer) for x in arrays)
    platform = jax.default_backend()
    runs_on = PLATFORMS.get(impl, (platform,))
    real = all(isinstance(x, jax.Array) for x in arrays)
    if concrete and real and not interpret and platform not in runs_on:
        raise ValueError(
            f"impl={impl!r} cannot run on the default device, which is of platform "
            f"{platform!r}: pass interpret=True to run its kernels in an interpreter, "
            "impl=None for a backend that fits, or use sadsl.lower(..., target=...) to "
            "compile it for another chip"
        )
    return impl
