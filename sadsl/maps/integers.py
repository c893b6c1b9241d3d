"""Run-time integers: int32, or refused by value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def integers(name: str, x: Any) -> jax.Array:
    """Integers as int32, or bools as they are.

    Raises:
      ValueError: neither; or some integer is not an int32, or may not be one.
    """
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.dtype == np.bool_:
        return jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"operand {name!r} has dtype {x.dtype}: it must be of integers"
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
    """Whether int32 holds whatever has this dtype."""
    info, most = np.iinfo(dtype), np.iinfo(np.int32)
    return most.min <= info.min and info.max <= most.max


def check_int32(name: str, x: np.ndarray) -> None:
    """Refuses integers of a run-time array that int32 does not hold.

    Raises:
      ValueError: there is one.
    """
    most = np.iinfo(np.int32)
    for value in (int(v) for v in (x.min(initial=0), x.max(initial=0))):
        if not most.min <= value <= most.max:
            raise ValueError(
                f"operand {name!r} holds {value}: run-time integers are int32, from "
                f"{most.min} to {most.max}; clip or renumber them (segment ids of any "
                "size may be passed as q_segment_ids= and kv_segment_ids=)"
            )
