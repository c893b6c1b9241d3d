"""``LinearState``: what a recurrence keeps of earlier tokens, and their documents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.linear import State
from pallas_kernels.precision import wide
from sadsl.run.linear_documents import padded, starts_of
from sadsl.terms.recurrent import Recurrent

# How many past documents a state remembers. Each step compares its id with all of them.
REMEMBERED = 64


class PastDocuments(NamedTuple):
    """The ids of the last documents, each once, the document of the last token first.

    A state keeps the sums of one document only. If a document comes back after another
    one, its sums are lost; the ids are kept to notice that.
    """

    ids: Array  # int32 [batch, REMEMBERED]; only the first of each row are used
    count: Array  # int32 [batch]: how many of them

    @property
    def used(self) -> Array:
        """Which entries of ``ids`` are used, bool ``[batch, REMEMBERED]``."""
        return jnp.arange(REMEMBERED)[None] < self.count[:, None]


class LinearState(NamedTuple):
    """The state of ``linear`` or ``delta``; its size does not grow with tokens.

    Attributes:
      s: the state, f32 ``[batch, heads, features, head_dim_v]``.
      z: the sums of features, f32 ``[batch, heads, features]``; with
        ``normalise="channel"`` their logarithms; None without a normaliser.
      documents: the ids of past documents; None without ``segments()``.
      position: the number of tokens so far, int32; None unless features depend on it.
    """

    s: Array
    z: Array | None
    documents: PastDocuments | None
    position: Array | None = None


def empty_state(
    term: Recurrent, batch: int, num_heads: int, features: int, head_dim_v: int
) -> LinearState:
    """The state before the first token."""
    nothing = -jnp.inf if term.by_channel_sums else 0.0
    documents = None
    if term.kind.segments:
        documents = PastDocuments(
            jnp.zeros((batch, REMEMBERED), jnp.int32), jnp.zeros(batch, jnp.int32)
        )
    z = jnp.full((batch, num_heads, features), nothing, jnp.float32)
    return LinearState(
        s=jnp.zeros((batch, num_heads, features, head_dim_v), jnp.float32),
        z=z if term.normalises else None,
        documents=documents,
        position=jnp.zeros((), jnp.int32) if term.positional else None,
    )


def start_of(
    term: Recurrent, before: LinearState | None, arrays: Any, at: Any
) -> tuple[State | None, Array | None]:
    """The state of the kernels, and whether the first key goes on with its document.

    ``arrays`` and ``at`` are the ``Arrays`` and the ``TokenArrays`` of ``linear``.

    Raises:
      ValueError: the state does not fit the call.
    """
    if before is None:
        return None, None
    _check_state(term, before, arrays)
    z = None if before.z is None else before.z[:, :, None]
    continues = None
    if before.documents is not None:
        past, (_, ids) = before.documents, at.ids
        continues = (past.ids[:, 0] == ids[:, 0]) & (past.count > 0)
    return State(before.s, z), continues


def next_state(
    term: Recurrent, before: LinearState | None, end: State, at: Any
) -> LinearState:
    """The state after the tokens of a call; arguments as in ``start_of``.

    Raises:
      ValueError: a document comes back, if the ids are not traced.
    """
    z = None if end.z is None else end.z[:, :, 0]
    past, s = None, end.s
    if at.ids is not None:
        past = past_documents(at.ids[1])
        if before is not None and before.documents is not None:
            past = _joined(before.documents, past)
            lost = lost_tokens(term, before, at)[:, -1]
            s = jnp.where(lost[:, None, None, None], jnp.nan, s)
    position = None
    if term.positional:
        past_tokens = 0 if before is None else before.position
        position = jnp.asarray(at.k.shape[1] + past_tokens, jnp.int32)
    return LinearState(s, z, past, position)


def lost_tokens(term: Recurrent, before: LinearState, at: Any) -> Array:
    """Which tokens are of a document that comes back after another, ``[batch, seq]``.

    Raises:
      ValueError: there is one, if the ids are not traced.
    """
    ids, past = at.ids[1], before.documents
    assert past is not None
    # The last document of the past may go on.
    earlier = past.used.at[:, 0].set(False)
    same = (ids[:, :, None] == past.ids[:, None, :]) & earlier[:, None, :]
    lost = same.any(axis=2)
    if not isinstance(lost, jax.core.Tracer) and lost.any():
        row, token = np.argwhere(np.asarray(lost))[0]
        raise ValueError(
            f"kv_segment_ids of batch entry {row}: document {int(ids[row, token])} "
            f"comes back after another, but {term!r} keeps the sums of one document: "
            "decode each document in one piece"
        )
    return lost


def past_documents(ids: Array) -> PastDocuments:
    """The documents of tokens ``[batch, seq]``, the one of the last token first."""
    seq = ids.shape[1]
    order = jnp.argsort(ids, axis=1, stable=True)
    together = jnp.take_along_axis(ids, order, axis=1)
    ends = jnp.roll(starts_of(together), -1, axis=1)
    at, _ = jax.lax.top_k(jnp.where(ends, order, -1), min(REMEMBERED, seq))
    found = jnp.take_along_axis(ids, jnp.maximum(at, 0), axis=1)
    count = jnp.sum(at >= 0, axis=1, dtype=jnp.int32)
    return PastDocuments(padded(found, 0, REMEMBERED - found.shape[1]), count)


def _joined(past: PastDocuments, new: PastDocuments) -> PastDocuments:
    """New documents, then those of the past that are not among them."""
    same = (past.ids[:, :, None] == new.ids[:, None, :]) & new.used[:, None, :]
    old = past.used & ~same.any(axis=2)
    absent = jnp.concatenate([~new.used, ~old], axis=1)
    order = jnp.argsort(absent, axis=1, stable=True)
    ids = jnp.concatenate([new.ids, past.ids], axis=1)
    ids = jnp.take_along_axis(ids, order, axis=1)[:, :REMEMBERED]
    count = new.count + old.sum(axis=1, dtype=jnp.int32)
    return PastDocuments(ids, jnp.minimum(count, REMEMBERED))


def _check_state(term: Recurrent, state: LinearState, arrays: Any) -> None:
    """Refuses a state of another term, or of other sizes.

    Raises:
      ValueError: the state does not fit.
      TypeError: it is no ``LinearState``.
    """
    if not isinstance(state, LinearState):
        raise TypeError(
            f"{term!r}: state0 is {type(state).__name__}: it must be a LinearState, "
            "of linear_state, linear_prefill or return_state=True"
        )
    batch, _, _, features = arrays.k.shape
    wanted = batch, features, arrays.v.shape[-1]
    found = state.s.shape[0], *state.s.shape[2:]
    others = [x.shape[2] for x in (arrays.k, arrays.v, arrays.erase) if x is not None]
    decay = arrays.log_decay
    heads = max(*others, *(() if decay is None else (decay.shape[1],)))
    if state.s.ndim != 4 or found != wanted or state.s.shape[1] != heads:
        raise ValueError(
            f"{term!r}: the state has shape {state.s.shape}: it must be [batch, heads, "
            f"features, head_dim_v], here {(batch, heads, *wanted[1:])}; make one with "
            "linear_state or linear_prefill"
        )
    fresh = empty_state(term, batch, 1, 1, 1)
    for field in ("z", "documents", "position"):
        if (getattr(state, field) is None) != (getattr(fresh, field) is None):
            raise ValueError(
                f"{term!r}: the state is of another term: its {field} is "
                f"{'missing' if getattr(state, field) is None else 'not used'}; make "
                "one with linear_state or linear_prefill for this term"
            )
    if state.s.dtype not in (jnp.float32, wide(arrays.k.dtype)):
        raise ValueError(
            f"{term!r}: the state has dtype {state.s.dtype}: it must be float32, or "
            "float64 if k is, since sums are kept in it"
        )
