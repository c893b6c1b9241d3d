"""Runs a recurrence on prepared arrays: in order, by document, or as two sums."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import linear as kernels
from pallas_kernels.linear.chunk import normalised
from pallas_kernels.linear.marks import clipped
from pallas_kernels.precision import wide
from sadsl.run.linear_documents import (
    Documents,
    by_document,
    in_order,
    padded,
    rows_in_order,
    starts_of,
)
from sadsl.run.linear_reference import all_pairs, token_by_token
from sadsl.run.running_softmax import running_softmax
from sadsl.run.symbolic_batch import KNOWN_SIZES, entry_by_entry, is_symbolic
from sadsl.terms.recurrent import Kind

# The logit of a key that is not there.
ABSENT = -1e30


@dataclass(frozen=True)
class Static:
    """The static part of a call.

    Attributes:
      kind: which keys a query sees.
      documents: what is known of packed documents; None without segment ids.
      positive: whether no weight is negative, so that the output has an lse.
      logits: whether k holds logits, and each channel takes a softmax over the keys.
      one_piece: whether each document must be in one piece.
      q_offset: the position of the first query.
      impl: the backend.
      call: the static part of the kernel call.
    """

    kind: Kind
    documents: Documents | None
    positive: bool
    logits: bool
    one_piece: bool
    q_offset: int
    impl: str
    call: kernels.LinearCall

    @property
    def absent(self) -> float:
        """What stands in k where there is no key."""
        return ABSENT if self.logits else 0.0


class Arrays(NamedTuple):
    """The arrays of a call; each number of heads divides the greatest."""

    q: Array  # [batch, q_seq, num_q_heads, features]
    k: Array  # [batch, kv_seq, num_kv_heads, features]
    v: Array  # [batch, kv_seq, num_v_heads, head_dim_v]
    erase: Array | None = None  # [batch, kv_seq, heads, features]
    log_decay: Array | None = None  # [batch or 1, heads or 1, positions, ...]
    bonus: Array | None = None  # [heads, features]
    ids: tuple[Array, Array] | None = None  # [batch, seq] of queries and keys
    state: kernels.State | None = None  # before the first key
    continues: Array | None = None  # [batch]: the first key goes on with its document


@partial(jax.jit, static_argnames="static")
def run(arrays: Arrays, *, static: Static) -> tuple[Array, Array | None, Any]:
    """The output ``[batch, q_seq, heads, head_dim_v]``, the lse or None, the state."""
    if is_symbolic(arrays.q) and static.impl in KNOWN_SIZES:
        return entry_by_entry(partial(_run, static=static), arrays)
    return _run(arrays, static=static)


def _run(arrays: Arrays, *, static: Static) -> tuple[Array, Array | None, Any]:
    rule, state = static.call.rule, None
    pairwise = arrays.erase is None and not static.logits and not rule.read_before
    by_head = arrays.log_decay is None or arrays.log_decay.ndim == 3
    if static.impl == "reference" and pairwise and by_head and not static.one_piece:
        out, total = all_pairs(arrays, static)
    elif static.kind.causal:
        out, total, state = _causal(arrays, static)
    elif static.kind.segments or arrays.erase is not None:
        out, total, state = _by_document(arrays, static)
    else:
        out, total = _sums(arrays, static)
    if arrays.bonus is not None:
        out += _own(arrays).astype(out.dtype)
    if total is None or not static.positive:
        return out, None, state
    seen = total != 0
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
    return out, jnp.swapaxes(lse, 1, 2), state


def _own(arrays: Arrays) -> Array:
    """What a query that reads before the write reads of its own key."""
    q, k, v, bonus = arrays.q, arrays.k, arrays.v, arrays.bonus
    assert bonus is not None
    heads = max(x.shape[-2] for x in (q, k, v, bonus))
    q, k, v, bonus = (_repeated(x, heads) for x in (q, k, v, bonus))
    weight = jnp.sum(q * k * bonus[None, None], axis=-1, keepdims=True)
    return weight * v


def _repeated(x: Array, heads: int) -> Array:
    """``[..., some heads, n]`` as ``[..., heads, n]``."""
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)


# --- causal: a recurrence ---


def _causal(arrays: Arrays, static: Static) -> tuple[Array, Array | None, Any]:
    """The recurrence, in the given order or sorted by document."""
    known = static.documents
    if known is None or known.in_order:
        return _aligned(arrays, static)
    if static.one_piece:
        return _where_in_order(arrays, _aligned(arrays, static))
    if known.in_order is False or known.same_ids:
        return _by_document(arrays, static)
    assert arrays.ids is not None
    # Sorted, queries and keys have separate slots: twice as many as in order. Without
    # the checkpoint, `cond` would also write the residuals of the branch not taken.
    moved = jax.checkpoint(partial(_by_document, static=static))
    as_given = partial(_aligned, static=static)
    return jax.lax.cond(in_order(*arrays.ids), as_given, moved, arrays)


def _where_in_order(arrays: Arrays, results: Any) -> Any:
    """The results of a call, NaN where documents are in several pieces.

    Traced ids cannot be refused.
    """
    assert arrays.ids is not None
    fits = rows_in_order(*arrays.ids)

    def kept_where(x: Array) -> Array:
        return jnp.where(fits.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

    return jax.tree.map(kept_where, results)


def _aligned(arrays: Arrays, static: Static) -> tuple[Array, Array | None, Any]:
    """Pads queries and keys to the same positions, and runs the recurrence on them."""
    q, k, ids = arrays.q, arrays.k, arrays.ids
    q_seq, kv_seq, offset = q.shape[1], k.shape[1], static.q_offset
    seq = max(offset + q_seq, kv_seq)
    starts = None
    if ids is not None:
        q_ids, kv_ids = ids
        # A query whose id is not that of the key at its position sees nothing.
        q = jnp.where((q_ids == kv_ids)[:, :, None, None], q, 0)
        starts = starts_of(kv_ids)
        if arrays.continues is not None:
            starts = starts.at[:, 0].set(~arrays.continues)
    after = seq - kv_seq
    arrays = arrays._replace(
        q=padded(q, offset, seq - offset - q_seq),
        k=padded(k, 0, after, static.absent),
        v=padded(arrays.v, 0, after),
        erase=None if arrays.erase is None else padded(arrays.erase, 0, after),
    )
    out, total, state = _recurrence(arrays, starts, static)
    rows = slice(offset, offset + q_seq)
    return out[:, rows], None if total is None else total[:, rows], state


def _by_document(arrays: Arrays, static: Static) -> tuple[Array, Array | None, Any]:
    """Sorts keys and queries by document, and runs the recurrence on them.

    Ids may be in any order, and the lengths may differ. Without ids there is one
    document.
    """
    q, k, v, ids = arrays.q, arrays.k, arrays.v, arrays.ids
    if ids is None:
        ids = jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(k.shape[:2], jnp.int32)
    causal, known = static.kind.causal, static.documents
    paired = causal and known is not None and known.same_ids
    found = by_document(ids, static.q_offset, causal=causal, paired=paired)
    erase = arrays.erase
    placed = arrays._replace(
        q=found.of_query(q, k.shape[1]),
        k=found.of_key(k, q.shape[1], static.absent),
        v=found.of_key(v, q.shape[1]),
        erase=None if erase is None else found.of_key(erase, q.shape[1]),
        log_decay=found.between(arrays.log_decay),
    )
    out, total, state = _recurrence(placed, found.starts, static)
    out = found.of_queries(out, q.shape[1])
    total = None if total is None else found.of_queries(total, q.shape[1])
    return out, total, state


def _recurrence(
    arrays: Arrays, starts: Array | None, static: Static
) -> tuple[Array, Array | None, Any]:
    """Runs the kernels; results are ``[batch, seq, heads, ...]``."""
    inputs, sums = kernel_inputs(arrays, starts, logits=static.logits)
    if static.impl == "reference":
        found = token_by_token(inputs, static.call.rule)
    else:
        found = kernels.attend(inputs, static.call, impl=static.impl)
    state = found.state if sums is None else found.state._replace(z=sums)
    total = None if found.total is None else _seq_first(found.total)
    return _seq_first(found.out), total, state


def kernel_inputs(
    arrays: Arrays, starts: Array | None, *, logits: bool
) -> tuple[kernels.LinearInputs, Array | None]:
    """The arrays with heads in front, one head for each state; the last log-sums.

    There is one state for each head of k, of v, of the decays or of the erase vectors,
    whichever are more. Fewer heads of the others are repeated. If k holds logits, each
    channel becomes a running softmax, and its log-sums are returned.
    """
    sums, state = None, arrays.state
    if logits:
        before = None if state is None else state.z
        k, decay, sums = running_softmax(arrays.k, starts, before)
        state = None if state is None else state._replace(z=None)
        arrays = arrays._replace(k=k, log_decay=decay, state=state)
    q, k, v, erase, decay = arrays[:5]
    heads = num_states(arrays)
    if decay is not None:
        decay = clipped(decay.astype(wide(q.dtype)))
        decay = jnp.repeat(decay, heads // decay.shape[1], axis=1)
    q = _repeated(q, max(heads, q.shape[2]))
    q = q.reshape(*q.shape[:2], heads, -1, q.shape[-1])

    def heads_first(x: Array | None) -> Array | None:
        return None if x is None else jnp.swapaxes(_repeated(x, heads), 1, 2)

    k, v, erase = heads_first(k), heads_first(v), heads_first(erase)
    assert k is not None
    assert v is not None
    q = jnp.moveaxis(q, 1, 3)
    found = kernels.LinearInputs(q, k, v, erase, decay, starts, state)
    return found, sums


def num_states(arrays: Arrays) -> int:
    """The number of states, of the heads of all arrays but q."""
    erase = () if arrays.erase is None else (arrays.erase.shape[2],)
    decay = () if arrays.log_decay is None else (arrays.log_decay.shape[1],)
    return max(arrays.k.shape[2], arrays.v.shape[2], *erase, *decay)


def _seq_first(x: Array) -> Array:
    """``[batch, heads, group, seq, ...]`` as ``[batch, seq, num_q_heads, ...]``."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


# --- full: two reductions ---


def _sums(arrays: Arrays, static: Static) -> tuple[Array, Array | None]:
    """``phi(q) (sum_k phi(k) v^T)``, and the same with 1 for v as the normaliser."""
    q, k, v = arrays[:3]
    # A sum over the keys exceeds the range of f16, but not that of bf16.
    dtype = wide(q.dtype)
    if static.logits:
        k = jax.nn.softmax(k.astype(dtype), axis=1)
    heads, narrow = num_states(arrays), dtype
    if q.dtype == jnp.bfloat16:
        narrow = jnp.bfloat16
    product = partial(jnp.einsum, precision="highest", preferred_element_type=dtype)
    q, k, v = (_repeated(x.astype(narrow), max(heads, x.shape[2])) for x in (q, k, v))
    batch, seq, num_q_heads, features = q.shape
    q = q.reshape(batch, seq, heads, -1, features)
    s = product("bkhd,bkhe->bhde", k, v).astype(narrow)
    out = product("bqhgd,bhde->bqhge", q, s)
    out = out.reshape(batch, seq, num_q_heads, -1)
    eps = static.call.rule.eps
    if eps is None:
        return out, None
    z = k.astype(dtype).sum(axis=1)
    total = product("bqhgd,bhd->bqhg", q.astype(dtype), z)
    total = total.reshape(batch, seq, num_q_heads, 1)
    out, total = normalised(out, total, eps)
    return out, total[..., 0]
