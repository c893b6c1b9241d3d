"""Forward mode: one loop over query blocks that computes the tangents of the outputs.

Let ``p`` be the probabilities and ``s'`` the tangents of the scores. Then each row has
``lse' = sum p s'`` and ``o' = sum p (s' v + v') - lse' o``. This is the derivative of
the softmax. Dao et al. (FlashAttention, 2022, appendix B) derive its reverse mode.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import softmax
from pallas_kernels.call import Call, Inputs, Kept, Outputs, ScoreValues, Vectors
from pallas_kernels.precision import widened
from pallas_kernels.varying import vary
from pallas_kernels.xla import added as scores
from pallas_kernels.xla import tile
from pallas_kernels.xla.added import Added, Pieces
from pallas_kernels.xla.heads import HeadGroup, head_groups, join
from pallas_kernels.xla.rows import Pass, fold_rows
from pallas_kernels.xla.traced_walks import Owner, for_owners, is_traced
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan


class TangentRow(NamedTuple):
    """The arrays that all tiles of a row use, ``[batch, kv_heads, group * q, ...]``."""

    at: Int32[Array, ""]
    q: Float[Array, "b h gq d"]
    # [q', q] along the features: its product with [k, k'] is q' k + q k'.
    turned: Float[Array, "b h gq two_d"]
    lse: Float[Array, "b h gq"]


class Sums(NamedTuple):
    """``sum p (s' v + v')`` and ``sum p s'``, of one row or of all rows in blocks."""

    o: Float[Array, "..."]
    lse: Float[Array, "..."]


def tangent(
    inputs: Inputs,
    direction: tuple[Inputs, ScoreValues | None],
    kept: Kept,
    vectors: Vectors,
    lists: XlaLists,
    call: Call,
) -> Outputs:
    """The derivative of the outputs along ``direction``.

    A direction has tangents of the inputs and of ``vectors.scores``; None means that
    the scores are constant. Memory is linear in the lengths. An empty row has tangents
    0.
    """
    directions, moved = direction
    # The score values and their tangents: for_owners splits both the same way.
    both_scores: Any = (vectors.scores, moved)
    vectors = vectors._replace(scores=both_scores)
    # Arrays and tangents side by side along the features: one gather reads both.
    pairs = zip(inputs, directions, strict=True)
    both = Inputs(*(jnp.concatenate(pair, axis=-1) for pair in pairs))
    if is_traced(lists):

        def of_owner(owner: Owner) -> Sums:
            lse = owner.of_queries(kept.lse)
            plan = owner.plan(lists.backward)
            return _tangent(owner.inputs, lse, owner.vectors, plan, owner.heads, call)

        sums = Sums(*for_owners(of_owner, both, vectors, lists))
    else:
        groups = head_groups(lists.map_of_head, lists.test_of_map, inputs.k.shape[1])
        parts = [
            _tangent(both, kept.lse, vectors, lists.backward, heads, call)
            for heads in groups
        ]
        q_heads = [heads.q_heads for heads in groups]
        sums = Sums(*(join(list(x), q_heads) for x in zip(*parts, strict=True)))
    moved_lse = sums.lse / kept.total
    o = sums.o / kept.total[..., None] - moved_lse[..., None] * widened(kept.o)
    return Outputs(o.astype(kept.o.dtype), moved_lse)


def _tangent(
    both: Inputs,
    lse: Array,
    vectors: Vectors,
    plan: XlaPlan,
    heads: HeadGroup,
    call: Call,
) -> Sums:
    """The sums of the heads of one group."""
    both_scores: Any = vectors.scores
    values, moved = both_scores
    vectors = vectors._replace(scores=values)
    q_seq_len, kv_seq_len = both.q.shape[2], both.k.shape[2]
    blocks = tile.operands(both, heads, plan)
    pairs = tile.pairs_of(call, vectors, heads, plan, (q_seq_len, kv_seq_len))
    added = pairs.scores
    if moved is not None:
        assert added is not None
        lengths, sizes = added.lengths, (added.block_q, added.block_kv)
        moved = scores.added(added.scores, moved, heads, lengths, sizes)
    lse = tile.to_blocks(tile.fold_heads(lse, heads), 3, plan.block_q, -jnp.inf)
    batch, kv_heads, group = lse.shape[:3]
    head_dim_v = both.v.shape[-1] // 2

    def start(total: Sums, row: Array) -> tuple[Any, Any]:
        of_row = tile.row_of(lse, row)
        there = ~jnp.isneginf(of_row)[..., None]
        both_q = jnp.where(there, tile.queries_of(blocks.q, row, kv_heads), 0.0)
        q, dq = jnp.split(both_q, 2, axis=-1)
        of_row = softmax.lse_for_backward(of_row, call.unit)
        fixed = TangentRow(row, q, jnp.concatenate([dq, q], axis=-1), of_row)
        lead = batch, kv_heads, group * plan.block_q
        empty = Sums(
            jnp.zeros((*lead, head_dim_v), lse.dtype), jnp.zeros(lead, lse.dtype)
        )
        return (fixed, total), vary(empty, q)

    def fold(fixed: Any, state: Sums, block: Array, shown: tile.Shown) -> Sums:
        k, v = (tile.gather(x, block, shown.seen) for x in (blocks.k, blocks.v))
        row, _ = fixed
        ds = None
        if added is not None and moved is not None:
            ds = tile_tangent(added, moved, row.at, block)
        p, pds = probabilities(row, k, shown, ds, group, call)
        v, dv = jnp.split(v, 2, axis=-1)
        lse, factor = pds.sum(axis=-1), pairs.factor(row.at, block, p.dtype)
        if factor is not None:
            factor = tile.for_all(factor, group, p.shape)
            p, pds = p * factor, pds * factor
        o = tile.batched_dot(pds, v, contract=(1, 0))
        o += tile.batched_dot(p, dv, contract=(1, 0))
        return Sums(state.o + o, state.lse + lse)

    def close(fixed: Any, state: Sums, row: Array) -> Sums:
        _, total = fixed
        return Sums(
            tile.put_queries(total.o, state.o, row),
            tile.put_row(total.lse, state.lse, row),
        )

    q_blocks, block_q, q_heads, _ = blocks.q.shape[1:]
    total = Sums(
        jnp.zeros((batch, q_blocks, block_q, q_heads, head_dim_v), lse.dtype),
        jnp.zeros(lse.shape, lse.dtype),
    )
    walk = plan.walks[heads.map_index]
    total = vary(total, both.q)
    total = fold_rows(walk, pairs, Pass(start, fold, close), total)
    lse = tile.from_blocks(total.lse, 3, q_seq_len).reshape(batch, q_heads, -1)
    return Sums(tile.heads_first(total.o, q_seq_len), lse)


def probabilities(
    row: TangentRow,
    k: Float[Array, "b h k two_d"],
    shown: tile.Shown,
    dbias: Float[Array, "..."] | None,
    group: int,
    call: Call,
) -> tuple[Float[Array, "b h gq k"], Float[Array, "b h gq k"]]:
    """``p`` and ``p s'`` of some blocks; ``k`` holds keys, then their tangents.

    ``dbias`` is the tangent of the values added to the scores, or None.
    """
    keys = k[..., : row.q.shape[-1]]
    s = tile.scores(row.q * call.scale, keys, group, call)
    ds = tile.batched_dot(row.turned, k, contract=(1, 1)).reshape(s.shape)
    ds *= call.sm_scale * softmax.cap_slope(s, call.logits_soft_cap, call.unit)
    if dbias is not None:
        ds += dbias
    s = tile.masked(s, shown) - row.lse.reshape(*s.shape[:-1], 1)
    p = softmax.power(s, call.unit)
    flat = *row.q.shape[:-1], s.shape[-1]
    return p.reshape(flat), (p * ds).reshape(flat)


def tile_tangent(
    added: Added, moved: Added, row: Int32[Array, ""], block: Int32[Array, " slots"]
) -> Float[Array, "..."]:
    """The tangent of the values added to some blocks, in natural units."""

    def of(pieces: Pieces) -> Array:
        return added.tile(pieces, row, block)

    pieces = added.pieces(row, block), moved.pieces(row, block)
    return jax.jvp(of, pieces[:1], pieces[1:])[1]
