"""The derivatives of one chunk, by ``jax.vjp`` of its rule inside backward kernels."""

from typing import Any, NamedTuple

import jax

from pallas_kernels.linear.algebra import (
    ChunkKeys,
    Dot,
    Pair,
    Recurrence,
    State,
    read,
    write,
)


class KeyGradients(NamedTuple):
    """The cotangents of ``ChunkKeys``; that of the log-decays is ``fine``."""

    k: Any  # [chunk, features]
    v: Any  # [chunk, head_dim_v]
    fine: Pair | None


def of_read(
    rule: Recurrence,
    dot: Dot,
    q: Any,
    keys: ChunkKeys,
    state: State,
    cotangents: tuple[Any, Any],
) -> tuple[Any, KeyGradients, State]:
    """The cotangents of ``q``, the keys and the state, from those of ``read``."""

    def f(q: Any, k: Any, v: Any, fine: Any, state: State) -> Any:
        marks = keys.marks._replace(fine=fine)
        return read(rule, dot, q, ChunkKeys(k, v, marks), state)

    _, pull = jax.vjp(f, q, keys.k, keys.v, keys.marks.fine, state)
    dq, dk, dv, dfine, dstate = pull(cotangents)
    return dq, KeyGradients(dk, dv, dfine), dstate


def of_write(
    rule: Recurrence, dot: Dot, keys: ChunkKeys, state: State, cotangent: State
) -> tuple[KeyGradients, State]:
    """The cotangents of the keys and the old state, from that of the new state."""

    def f(k: Any, v: Any, fine: Any, state: State) -> State:
        marks = keys.marks._replace(fine=fine)
        return write(rule, dot, ChunkKeys(k, v, marks), state)

    _, pull = jax.vjp(f, keys.k, keys.v, keys.marks.fine, state)
    dk, dv, dfine, dstate = pull(cotangent)
    return KeyGradients(dk, dv, dfine), dstate
