"""The array namespace of run-time plans: NumPy as long as nothing is traced.

What a plan knows of positions alone is then a NumPy array when the call is traced, and
no part of the compiled program. XLA would fold it at compile time, one element at a
time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class HostFirst:
    """The functions of ``jnp``, in NumPy where no argument is an array of JAX.

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
    """Whether no leaf of ``x`` is an array of JAX, traced or not."""
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))


def look_up(table: Any, *index: Any) -> Any:
    """``table[index]``, where the table may be known although the index is traced."""
    return (table if is_known(index) else jnp.asarray(table))[index]


def _narrowed(x: Any) -> Any:
    return x.astype(np.int32) if x.dtype == np.int64 else x
