"""Loops of a known number of steps."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def repeat(count: int, step: Callable[[Any, State], State], state: State) -> State:
    """Repeats ``state = step(i, state)`` for ``i`` from 0 to ``count - 1``.

    The index is always int32. That of ``fori_loop`` is int64 with ``jax_enable_x64``,
    which does not mix with int32 positions and does not lower for a TPU.
    """

    def body(i: Any, state: State) -> State:
        return step(jnp.asarray(i, jnp.int32), state)

    return jax.lax.fori_loop(0, count, body, state)
