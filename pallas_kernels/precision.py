"""The dtype of sums and statistics: float64 for float64 inputs, else float32."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: jax.typing.DTypeLike) -> Any:
    """The dtype of sums and statistics of arrays of ``dtype``."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widened(x: Any) -> Any:
    """``x`` in the dtype of its sums."""
    return x.astype(wide(x.dtype))
