"""Sorts the tokens of packed documents, so that a linear recurrence can run on them.

A recurrence resets its state where a document starts, so the tokens of a document must
be adjacent. If they are not, or if queries and keys have different positions, all
tokens are sorted by document, and by position within it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from lowering.run_time import sort
from pallas_kernels.linear.marks import GRAIN, STRONGEST, clipped

# A sum of log-decays below this counts as full decay. The limit is far from both ends
# of the range in which f32 sums and wrapped int32 sums are exact.
FORGOTTEN = 16 * STRONGEST


@dataclass(frozen=True)
class Documents:
    """What is known of the documents of a call before it runs.

    Attributes:
      in_order: whether each document is in one piece, and each query has the id of the
        key at its position, or an id that no key has; None if the ids are traced.
      same_ids: whether every query is known to have the id of the key at its position.
        Then one sort serves both, which saves a few percent of the time of a call.
    """

    in_order: bool | None
    same_ids: bool


def documents(ids: tuple[Array, Array], q_offset: int, *, same_ids: bool) -> Documents:
    """Reads ``Documents`` off the ids ``[batch, seq]`` of queries and keys.

    For traced ids, ``same_ids`` is what the caller knows.
    """
    q, kv = ids
    if q_offset or q.shape[1] != kv.shape[1]:
        return Documents(in_order=False, same_ids=False)
    if any(isinstance(x, jax.core.Tracer) for x in ids):
        return Documents(None, same_ids)
    q, kv = np.asarray(q), np.asarray(kv)
    return Documents(bool(in_order(q, kv, np)), bool((q == kv).all()))


def in_order(q_ids: Any, kv_ids: Any, xp: Any = jnp) -> Any:
    """Whether each document is in one piece, with queries at the positions of its keys.

    A query whose id no key has may be anywhere, since it sees nothing. On traced ids
    (``xp`` is jax.numpy) the answer is False wherever the ids of queries and keys
    differ.
    """
    together = xp.sort(kv_ids, axis=1)
    pieces, fewest = (
        xp.count_nonzero(xp.diff(x, axis=1), axis=1) for x in (kv_ids, together)
    )
    apart = q_ids != kv_ids
    if xp is np:
        has_keys = [np.isin(q, kv) for q, kv in zip(q_ids, kv_ids, strict=True)]
        return (pieces == fewest).all() and not (apart & has_keys).any()
    return (pieces == fewest).all() & ~apart.any()


def rows_in_order(q_ids: Array, kv_ids: Array) -> Array:
    """``in_order`` of each batch entry of traced ids, bool ``[batch]``, exactly."""
    together = jnp.sort(kv_ids, axis=1)
    pieces, fewest = (
        jnp.count_nonzero(jnp.diff(x, axis=1), axis=1) for x in (kv_ids, together)
    )
    has_keys = jax.vmap(partial(jnp.isin, method="sort"))(q_ids, kv_ids)
    return (pieces == fewest) & ~((q_ids != kv_ids) & has_keys).any(axis=1)


class Sorted(NamedTuple):
    """The order of tokens by document, as slots.

    The tokens are the keys, then the queries; if ``paired``, each token is a key and a
    query.

    Attributes:
      order: the token in each slot.
      slots: the slot of each token.
      at: the position of the token in each slot.
      starts: whether a document starts in a slot.
      paired: whether a token is a key and a query at once.
    """

    order: Int32[Array, "batch 1 slots"]
    slots: Int32[Array, "batch 1 tokens"]
    at: Int32[Array, "batch slots"]
    starts: Bool[Array, "batch slots"]
    paired: bool

    def of_query(self, x: Array, kv_seq: int) -> Array:
        """Moves ``x [batch, q_seq, heads, dim]`` to slots, with 0 at the keys."""
        x = x if self.paired else padded(x, kv_seq, 0)
        return sort.permute(x, self.order, self.slots)

    def of_key(self, x: Array, q_seq: int, absent: float = 0.0) -> Array:
        """Moves ``x [batch, kv_seq, heads, dim]`` to slots, ``absent`` at queries."""
        x = x if self.paired else padded(x, 0, q_seq, absent)
        return sort.permute(x, self.order, self.slots)

    def between(self, log_decay: Array | None) -> Array | None:
        """Log-decays ``[batch, heads, positions, ...]``, summed from slot to slot."""
        if log_decay is None:
            return None
        return _between(log_decay, self.at, self.starts)

    def of_queries(self, x: Array, q_seq: int) -> Array:
        """The rows of the queries in ``x [batch, slots, ...]``, in the given order."""
        x = sort.permute(x, self.slots, self.order)
        return x[:, x.shape[1] - q_seq :]


def by_document(
    ids: tuple[Array, Array], q_offset: int, *, causal: bool, paired: bool
) -> Sorted:
    """Sorts by document, then by position; at one position the key comes first.

    If not ``causal``, all keys of a document come before its queries.
    """
    q_ids, kv_ids = ids
    labels, at = kv_ids, np.arange(kv_ids.shape[1])
    if not paired:
        labels = jnp.concatenate([kv_ids, q_ids], axis=1)
        at = np.concatenate([at, q_offset + np.arange(q_ids.shape[1])])
    # The sort by id is stable, so this order remains within each document.
    first = np.argsort(at, kind="stable") if causal else np.arange(len(at))
    order = jnp.argsort(labels[:, first], axis=1, stable=True)
    order = jnp.asarray(first, jnp.int32)[order]
    slots = jnp.argsort(order, axis=1).astype(jnp.int32)
    starts = starts_of(jnp.take_along_axis(labels, order, axis=1))
    at = jnp.asarray(at, jnp.int32)[order]
    return Sorted(order[:, None], slots[:, None], at, starts, paired)


def starts_of(ids: Array) -> Array:
    """Where a document starts, bool ``[batch, seq]``."""
    first = jnp.ones_like(ids[:, :1], bool)
    return jnp.concatenate([first, ids[:, 1:] != ids[:, :-1]], axis=1)


def padded(x: Array, before: int, after: int, fill: float = 0.0) -> Array:
    """``[batch, seq, ...]`` with ``fill`` before and after along the sequence."""
    if not before and not after:
        return x
    widths = [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=fill)


def _between(
    log_decay: Float[Array, "_batch heads positions ..."],
    at: Int32[Array, "batch slots"],
    starts: Bool[Array, "batch slots"],
) -> Float[Array, "batch heads slots ..."]:
    """The sum of the log-decays from the previous slot's position to this slot's.

    The sum leaves out the former and includes the latter position. It is 0 where a
    document starts. All positions in between count, whatever their document.
    """
    decay = clipped(log_decay)
    # A difference of two prefix sums must be as exact as a sum over the steps between.
    # So decay = grains * GRAIN + rest: grains are summed as integers, whose differences
    # are exact even if a sum wraps, and the sum of the rests is small.
    grains = jax.lax.stop_gradient(jnp.round(decay / GRAIN))
    fine = jnp.cumsum(decay - grains * GRAIN, axis=2)
    coarse = jnp.cumsum(grains.astype(jnp.int32), axis=2)
    rough = jax.lax.stop_gradient(jnp.cumsum(decay, axis=2))

    def steps(total: Array) -> Array:
        spread = (at.shape[0], *total.shape[1:])
        place = at.reshape(at.shape[0], 1, -1, *[1] * (total.ndim - 3))
        here = jnp.take_along_axis(
            jnp.broadcast_to(total, spread), place, axis=2, mode="clip"
        )
        return jnp.diff(here, axis=2, prepend=here[:, :, :1])

    found = steps(coarse).astype(decay.dtype) * GRAIN + steps(fine)
    found = jnp.where(steps(rough) < FORGOTTEN, STRONGEST, found)
    starts = starts.reshape(starts.shape[0], 1, -1, *[1] * (found.ndim - 3))
    return jnp.where(starts, 0.0, found)


# --- queries and keys that are in no pair may hold NaN: they are set to 0 ---


class Present(NamedTuple):
    """Which queries and keys are in a pair, bool ``[batch, seq]``; None for all."""

    q: Array | None
    k: Array | None


def present(
    ids: tuple[Array, Array] | None,
    lengths: tuple[int, int],
    q_offset: int,
    *,
    causal: bool,
) -> Present:
    """The queries that see a key, and the keys that some query sees."""
    q_seq, kv_seq = lengths
    rows = q_offset + jnp.arange(q_seq, dtype=jnp.int32)
    columns = jnp.arange(kv_seq, dtype=jnp.int32)
    if ids is None:
        end = q_offset + q_seq
        unused = causal and kv_seq > end
        return Present(None, (columns < end)[None] if unused else None)
    q_ids, kv_ids = ids
    # A key is seen if the last query of its document is not before it; a query sees a
    # key if the first key of its document is not after it.
    last, has_query = jax.vmap(partial(_last_of, at=rows))(q_ids, kv_ids)
    first, has_key = jax.vmap(partial(_last_of, at=-columns))(kv_ids, q_ids)
    if causal:
        has_query &= last >= columns[None]
        has_key &= -first <= rows[None]
    return Present(has_key, has_query)


@partial(jax.jit, static_argnames="absent")
def kept(x: Array, there: Array | None, absent: float = 0.0) -> Array:
    """``x [batch, seq, heads, dim]``, ``absent`` where a token is not ``there``."""
    return x if there is None else jnp.where(there[:, :, None, None], x, absent)


def _last_of(ids: Array, asked: Array, *, at: Array) -> tuple[Array, Array]:
    """For each id ``asked``, the greatest ``at`` with this id, and whether it exists.

    ``ids`` and ``at`` are ``[n]``, ``asked`` is ``[m]``, and both results are ``[m]``.
    """
    order = jnp.lexsort((at, ids))
    of_order = ids[order]
    place = jnp.searchsorted(of_order, asked, side="right") - 1
    place = jnp.maximum(place, 0)
    return at[order][place], of_order[place] == asked
