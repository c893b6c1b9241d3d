"""Runs ``linear``: as a recurrence, as two sums, or over all pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import linear as kernels
from pallas_kernels.linear.algebra import normalised
from pallas_kernels.precision import wide
from sadsl.run.attend import attend
from sadsl.run.linear_documents import (
    Documents,
    by_document,
    documents,
    in_order,
    padded,
    starts_of,
)
from sadsl.run.linear_operands import clipped, features_of, log_decays, segment_ids
from sadsl.run.symbolic_batch import KNOWN_SIZES, entry_by_entry, is_symbolic
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.linear import Kind, Linear


@dataclass(frozen=True)
class Static:
    """The static part of a call.

    Attributes:
      kind: which keys a query sees.
      documents: what is known of packed documents; None without segment ids.
      eps: the number added to the normaliser; None without a normaliser.
      positive: whether no weight is negative, so that the output has an lse.
      q_offset: the position of the first query.
      impl: the backend.
      call: the static part of the kernel call; None for the reference.
    """

    kind: Kind
    documents: Documents | None
    eps: float | None
    positive: bool
    q_offset: int
    impl: str
    call: kernels.LinearCall | None


class Arrays(NamedTuple):
    """The arrays of a call: features, values, log-decays and document ids."""

    q: Array  # [batch, q_seq, num_q_heads, features]
    k: Array  # [batch, kv_seq, num_kv_heads, features]
    v: Array  # [batch, kv_seq, num_kv_heads, head_dim_v]
    log_decay: Array | None = None  # [batch or 1, heads or 1, positions]
    ids: tuple[Array, Array] | None = None  # [batch, seq] of queries and keys


@attend.register
def _(term: Linear, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """Linear attention on any backend, at a cost linear in the length.

    ``impl="reference"`` is the definition, over all pairs. On every backend, ``full()``
    is two matrix products in XLA.

    Raises:
      ValueError: arrays, sizes and the term do not fit together.
      NotImplementedError: the call has dropout, or no recurrence for it exists.
    """
    if setting.dropout_rate:
        raise NotImplementedError(
            f"dropout_rate={setting.dropout_rate}: {term!r} has no attention weights "
            "to drop: use 0"
        )
    q, k, v = inputs
    ids, known, there = None, None, Present(None, None)
    if term.kind.segments:
        ids = (
            segment_ids("q_segment_ids", given, q.shape[:2]),
            segment_ids("kv_segment_ids", given, k.shape[:2]),
        )
        one_array = given["q_segment_ids"] is given["kv_segment_ids"]
        known = documents(ids, setting.q_offset, same_ids=one_array)
    if known is None or not known.same_ids or setting.q_offset:
        lengths = q.shape[1], k.shape[1]
        there = present(ids, lengths, setting.q_offset, causal=term.kind.causal)
    # Before the feature map: its slope at such a row may be NaN, and so may 0 times it.
    q, k, v = kept(q, there.q), kept(k, there.k), kept(v, there.k)
    phi = features_of(term, given)
    fq, fk = phi(q, "q"), phi(k, "k")
    if fq.shape[-1] != fk.shape[-1]:
        raise ValueError(
            f"{term!r}: the feature map yields {fq.shape[-1]} features of q and "
            f"{fk.shape[-1]} of k: the two numbers must be equal"
        )
    decay = log_decays(term, given, (q, k), setting.q_offset)
    eps = term.eps if term.normalise else None
    call = None
    if setting.impl != "reference":
        length = max(setting.q_offset + q.shape[1], k.shape[1])
        sizes = length, fq.shape[-1], v.shape[-1]
        call = kernels.default_call(
            kernels.scalar(eps), setting.impl, sizes, fk.dtype,
            setting.config, setting.interpret,
        )  # fmt: skip
    static = Static(
        term.kind, known, eps, term.positive, setting.q_offset, setting.impl, call
    )
    arrays = Arrays(fq, fk, v.astype(fk.dtype), decay, ids)
    out, lse = run(arrays, static=static)
    return Outcome(kept(out.astype(v.dtype), there.q), lse)


@partial(jax.jit, static_argnames="static")
def run(arrays: Arrays, *, static: Static) -> tuple[Array, Array | None]:
    """The output ``[batch, q_seq, num_q_heads, head_dim_v]``, and the lse or None."""
    if is_symbolic(arrays.q) and static.impl in KNOWN_SIZES:
        return entry_by_entry(partial(_run, static=static), arrays)
    return _run(arrays, static=static)


def _run(arrays: Arrays, *, static: Static) -> tuple[Array, Array | None]:
    if static.impl == "reference":
        out, total = _dense(arrays, static)
    elif static.kind.causal:
        out, total = _causal(arrays, static)
    elif static.kind.segments:
        out, total = _by_document(arrays, static)
    else:
        out, total = _sums(arrays, static)
    if total is None or not static.positive:
        return out, None
    seen = total != 0
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
    return out, jnp.swapaxes(lse, 1, 2)


# --- over all pairs: the definition ---


def _dense(arrays: Arrays, static: Static) -> tuple[Array, Array | None]:
    """``sum_k w_qk v_k`` over the pairs of the map, with all weights in memory."""
    q, k, v, log_decay, ids = arrays
    dtype = wide(q.dtype)
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    rows = static.q_offset + jnp.arange(q.shape[1])[:, None]
    columns = jnp.arange(k.shape[1])[None, :]
    seen = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool)
    if static.kind.causal:
        seen &= (columns <= rows)[None, None]
    if ids is not None:
        seen &= (ids[0][:, :, None] == ids[1][:, None, :])[:, None]
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    if log_decay is not None:
        # One sum for every pair: a difference of two prefix sums would be less exact.
        decay = clipped(log_decay)
        after = (jnp.arange(decay.shape[2])[:, None] > columns)[None, None]
        steps = jnp.cumsum(jnp.where(after, decay[..., None], 0.0), axis=2)
        steps = steps[:, :, static.q_offset : static.q_offset + q.shape[1]]
        if steps.shape[1] > 1:
            steps = jnp.repeat(steps, q.shape[2] // steps.shape[1], axis=1)
        weights *= jnp.exp(steps)
    weights = jnp.where(seen, weights, 0.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
    if static.eps is None:
        return out, None
    total = jnp.swapaxes(weights.sum(axis=3), 1, 2)[..., None]
    out, total = normalised(out, total, static.eps)
    return out, total[..., 0]


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


@jax.jit
def kept(x: Array, there: Array | None) -> Array:
    """``x [batch, seq, heads, dim]`` with 0 at the positions that are not ``there``."""
    return x if there is None else jnp.where(there[:, :, None, None], x, 0)


def _last_of(ids: Array, asked: Array, *, at: Array) -> tuple[Array, Array]:
    """For each id ``asked``, the greatest ``at`` with this id, and whether it exists.

    ``ids`` and ``at`` are ``[n]``, ``asked`` is ``[m]``, and both results are ``[m]``.
    """
    order = jnp.lexsort((at, ids))
    of_order = ids[order]
    place = jnp.searchsorted(of_order, asked, side="right") - 1
    place = jnp.maximum(place, 0)
    return at[order][place], of_order[place] == asked


# --- causal: a recurrence ---


def _causal(arrays: Arrays, static: Static) -> tuple[Array, Array | None]:
    """The recurrence, in the given order or sorted by document."""
    known = static.documents
    if known is None or known.in_order:
        return _aligned(arrays, static)
    if known.in_order is False or known.same_ids:
        return _by_document(arrays, static)
    assert arrays.ids is not None
    # Sorted, queries and keys have separate slots: twice as many as in order. Without
    # the checkpoint, `cond` would also write the residuals of the branch not taken.
    moved = jax.checkpoint(partial(_by_document, static=static))
    as_given = partial(_aligned, static=static)
    return jax.lax.cond(in_order(*arrays.ids), as_given, moved, arrays)


def _aligned(arrays: Arrays, static: Static) -> tuple[Array, Array | None]:
    """Pads queries and keys to the same positions, and runs the recurrence on them."""
    q, k, v, log_decay, ids = arrays
    q_seq, kv_seq, offset = q.shape[1], k.shape[1], static.q_offset
    seq = max(offset + q_seq, kv_seq)
    starts = None
    if ids is not None:
        q_ids, kv_ids = ids
        # A query whose id is not that of the key at its position sees nothing.
        q = jnp.where((q_ids == kv_ids)[:, :, None, None], q, 0)
        starts = starts_of(kv_ids)
    q = padded(q, offset, seq - offset - q_seq)
    k, v = (padded(x, 0, seq - kv_seq) for x in (k, v))
    out, total = _recurrence(Arrays(q, k, v, log_decay), starts, static)
    rows = slice(offset, offset + q_seq)
    return out[:, rows], None if total is None else total[:, rows]


def _by_document(arrays: Arrays, static: Static) -> tuple[Array, Array | None]:
    """Sorts keys and queries by document, and runs the recurrence on them.

    Ids may be in any order, and the lengths may differ.
    """
    q, k, v, log_decay, ids = arrays
    assert ids is not None
    assert static.documents is not None
    causal = static.kind.causal
    paired = causal and static.documents.same_ids
    found = by_document(ids, static.q_offset, causal=causal, paired=paired)
    placed = Arrays(*found.placed(q, k, v), found.between(log_decay))
    out, total = _recurrence(placed, found.starts, static)
    out = found.of_queries(out, q.shape[1])
    return out, None if total is None else found.of_queries(total, q.shape[1])


def _recurrence(
    arrays: Arrays, starts: Array | None, static: Static
) -> tuple[Array, Array | None]:
    """Runs the kernels; results are ``[batch, seq, num_q_heads, ...]``."""
    assert static.call is not None
    inputs = kernel_inputs(arrays, starts)
    found = kernels.attend(inputs, static.call, impl=static.impl)
    return _seq_first(found.out), (
        None if found.total is None else _seq_first(found.total)
    )


def kernel_inputs(arrays: Arrays, starts: Array | None) -> kernels.LinearInputs:
    """The arrays with heads in front, one head for each state.

    There is one state for each head of k, or for each head of q if decays differ there.
    """
    q, k, v, log_decay, _ = arrays
    batch, seq, num_q_heads, features = q.shape
    heads = k.shape[2]
    if log_decay is not None:
        log_decay = log_decay.astype(wide(q.dtype))
        heads = max(heads, log_decay.shape[1])
        log_decay = jnp.broadcast_to(
            log_decay, (log_decay.shape[0], heads, log_decay.shape[2])
        )
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    q = q.reshape(batch, seq, heads, num_q_heads // heads, features)
    return kernels.LinearInputs(
        jnp.moveaxis(q, 1, 3), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2),
        log_decay, starts,
    )  # fmt: skip


def _seq_first(x: Array) -> Array:
    """``[batch, heads, group, seq, ...]`` as ``[batch, seq, num_q_heads, ...]``."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


# --- full: two reductions ---


def _sums(arrays: Arrays, static: Static) -> tuple[Array, Array | None]:
    """``phi(q) (sum_k phi(k) v^T)``, and the same with 1 for v as the normaliser."""
    q, k, v, _, _ = arrays
    batch, seq, num_q_heads, features = q.shape
    # A sum over the keys exceeds the range of f16, but not that of bf16.
    dtype = wide(q.dtype)
    narrow = jnp.bfloat16 if q.dtype == jnp.bfloat16 else dtype
    product = partial(jnp.einsum, precision="highest", preferred_element_type=dtype)
    q, k, v = (x.astype(narrow) for x in (q, k, v))
    q = q.reshape(batch, seq, k.shape[2], -1, features)
    s = product("bkhd,bkhe->bhde", k, v).astype(narrow)
    out = product("bqhgd,bhde->bqhge", q, s)
    out = out.reshape(batch, seq, num_q_heads, -1)
    if static.eps is None:
        return out, None
    z = k.astype(dtype).sum(axis=1)
    total = product("bqhgd,bhd->bqhg", q.astype(dtype), z)
    total = total.reshape(batch, seq, num_q_heads, 1)
    out, total = normalised(out, total, static.eps)
    return out, total[..., 0]
