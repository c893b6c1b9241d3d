"""Converts run-time integer arrays to int32 and refuses values that do not fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def integers(name: str, x: Any) -> jax.Array:
    """Converts an array of integers to int32; an array of bools stays as it is.

    Raises:
      ValueError: the array holds neither, or a value does not fit int32, or the values
        are traced and may not fit.
    """
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.dtype == np.bool_:
        return jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"operand {name!r} has dtype {x.dtype}: it must be of integers or bools; "
            "cast it with .astype(np.int32)"
        )
    if not holds_int32(x.dtype):
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"operand {name!r} is traced as {x.dtype}, and int32 may not hold its "
                "values, which are not known yet: cast it with .astype(jnp.int32), or "
                "number segment ids from 0 before they are traced"
            )
        x = np.asarray(x)
        check_int32(name, x)
    return jnp.asarray(x, jnp.int32)


def holds_int32(dtype: Any) -> bool:
    """Whether int32 holds every value of this integer dtype."""
    info, most = np.iinfo(dtype), np.iinfo(np.int32)
    return most.min <= info.min and info.max <= most.max


def check_int32(name: str, x: np.ndarray) -> None:
    """Checks that every value of a run-time array fits int32.

    Raises:
      ValueError: a value does not fit.
    """
    most = np.iinfo(np.int32)
    for value in (int(v) for v in (x.min(initial=0), x.max(initial=0))):
        if not most.min <= value <= most.max:
            raise ValueError(
                f"operand {name!r} holds {value}: run-time integers are int32, from "
                f"{most.min} to {most.max}; clip or renumber them (segment ids of any "
                "size may be passed as q_segment_ids= and kv_segment_ids=)"
            )
