"""Values that are channels of the keys: a kernel then loads keys alone.

With ``values = (start, stop)``, the values of a call are ``k[..., start:stop]`` and its
``v`` is not read. ``dk`` is then the gradient of keys and values together.
"""

import jax
import jax.numpy as jnp

# The lanes of a register of a TPU: a slice of a tile that starts and stops at a
# multiple of this moves no data.
LANES = 128
# The smallest side of a matrix on the tensor cores of an NVIDIA GPU.
SMALLEST = 16

Values = tuple[int, int]


def loaded_once(
    values: Values | None, head_dim: int, impl: str, *, by_lists: bool = False
) -> Values | None:
    """``values`` if the kernels of ``impl`` take them from a loaded tile of keys.

    Otherwise None: the caller cuts ``v`` from ``k``, and kernels load both.

    Example:
      >>> loaded_once((0, 512), 576, "tpu"), loaded_once((0, 500), 576, "tpu")
      ((0, 512), None)
    """
    if values is None:
        return None
    start, stop = values
    match impl:
        case "tpu":
            whole = start % LANES == 0 and (stop % LANES == 0 or stop == head_dim)
        case "triton":
            # A tile cannot be cut in registers, so keys are loaded in two parts: the
            # values and the rest. The channels of a part are a power of two.
            whole = start == 0 and stop >= SMALLEST and not stop & (stop - 1)
        case _:
            # Blocks on a CPU are in cache when they are read for the second time. By
            # lists, products have all channels of the keys.
            whole = by_lists and 2 * (stop - start) >= head_dim
    return values if whole else None


def in_keys(x: jax.Array, values: Values, head_dim: int) -> jax.Array:
    """``x [..., values]`` in the channels of keys, with 0 in the others."""
    widths = [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, [*widths, (values[0], head_dim - values[1])])


def of_keys(k: jax.Array, values: Values) -> jax.Array:
    """The values among the channels of keys."""
    return k[..., slice(*values)]
