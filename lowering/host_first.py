"""An array namespace for run-time plans: NumPy until an argument is a JAX array.

What depends on positions alone is then computed by NumPy while the call is traced, and
is no part of the compiled program. XLA would fold it at compile time, one element at a
time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class HostFirst:
    """The functions of ``jnp``; those of NumPy where no argument is a JAX array.

    Integers are int32, as they are on the device.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if is_known(args):
                return _narrowed(getattr(np, name)(*args, **options))
            return getattr(jnp, name)(*args, **options)

        return call


HOST_FIRST = HostFirst()


def is_known(x: Any) -> bool:
    """Whether no leaf of ``x`` is a JAX array, traced or not."""
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))


def look_up(table: Any, *index: Any) -> Any:
    """``table[index]``; the table may be a NumPy array although the index is traced."""
    return (table if is_known(index) else jnp.asarray(table))[index]


def _narrowed(x: Any) -> Any:
    return x.astype(np.int32) if x.dtype == np.int64 else x
