"""The backward pass: one loop over query blocks, whose state holds dk and dv.

The weights are computed again from the lse (FlashAttention-2, Dao, 2023, algorithm 2),
for one row of blocks at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import softmax
from pallas_kernels.call import Call, Cotangents, Inputs, Vectors
from pallas_kernels.loops import repeat
from pallas_kernels.varying import vary
from pallas_kernels.xla import tile
from pallas_kernels.xla.heads import HeadGroup, add_up, head_groups, join, pick
from pallas_kernels.xla.rows import Pass, fold_rows
from pallas_kernels.xla.traced_walks import Owner, add_group, for_owners, is_traced
from pallas_kernels.xla.walk_types import XlaLists


class Gradients(NamedTuple):
    """The gradients of some heads in blocks; those of keys are summed in f32."""

    dq: Float[Array, "batch q_blocks block_q q_heads head_dim"]
    dk: Float[Array, "batch kv_heads kv_blocks block_kv head_dim"]
    dv: Float[Array, "batch kv_heads kv_blocks block_kv head_dim_v"]


class GradientRow(NamedTuple):
    """The arrays that all tiles of a row use, ``[batch, kv_heads, group * q, ...]``.

    ``lse`` is from ``softmax.lse_for_backward``.
    """

    at: Int32[Array, ""]
    q: Float[Array, "b h gq head_dim"]
    do: Float[Array, "b h gq head_dim_v"]
    lse: Float[Array, "b h gq"]
    delta: Float[Array, "b h gq"]


def row_of(
    at: Int32[Array, ""], q: Array, do: Array, lse: Array, delta: Array, call: Call
) -> GradientRow:
    """The row with index ``at`` of arrays in blocks."""
    kv_heads = lse.shape[1]
    lse, delta = tile.row_of(lse, at), tile.row_of(delta, at)
    q, do = (tile.queries_of(x, at, kv_heads) for x in (q, do))
    return GradientRow(at, q, do, softmax.lse_for_backward(lse, call.unit), delta)


def backward(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: XlaLists,
    call: Call,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``dq, dk, dv`` over the blocks of ``lists.backward``."""
    num_kv_heads = inputs.k.shape[1]
    if is_traced(lists):

        def of_owner(owner: Owner) -> tuple[jax.Array, ...]:
            args = owner.inputs, owner.of_queries(cotangents), owner.vectors
            return _backward(*args, owner.plan(lists.backward), owner.heads, call)

        dq, dk, dv = for_owners(of_owner, inputs, vectors, lists)
        dk, dv = (add_group(x, num_kv_heads) for x in (dk, dv))
        return dq, dk.astype(inputs.k.dtype), dv.astype(inputs.v.dtype)
    groups = head_groups(lists.map_of_head, lists.test_of_map, num_kv_heads)
    parts = [
        _backward(inputs, cotangents, vectors, lists.backward, heads, call)
        for heads in groups
    ]
    dq, dk, dv = (list(x) for x in zip(*parts, strict=True))
    kv_heads = [heads.kv_heads for heads in groups]
    return (
        join(dq, [heads.q_heads for heads in groups]),
        add_up(dk, kv_heads, num_kv_heads).astype(inputs.k.dtype),
        add_up(dv, kv_heads, num_kv_heads).astype(inputs.v.dtype),
    )


def _backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, plan: Any,
    heads: HeadGroup, call: Call,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """``dq, dk, dv`` of the heads of one group."""
    q_seq_len, kv_seq_len = inputs.q.shape[2], inputs.k.shape[2]
    blocks = tile.operands(inputs, heads, plan)
    pairs = tile.pairs_of(call, vectors, heads, plan, (q_seq_len, kv_seq_len))
    lse = tile.to_blocks(
        tile.fold_heads(cotangents.lse, heads), 3, plan.block_q, -jnp.inf
    )
    delta = tile.to_blocks(tile.fold_heads(cotangents.delta, heads), 3, plan.block_q)
    do = tile.positions_first(pick(cotangents.do, heads.q_heads), plan.block_q)
    batch, kv_heads, group = lse.shape[:3]

    def start(total: Gradients, row: Array) -> tuple[Any, Any]:
        fixed = row_of(row, blocks.q, do, lse, delta, call)
        return fixed, (total, jnp.zeros_like(fixed.q))

    def fold(fixed: GradientRow, state: Any, block: Array, shown: tile.Shown) -> Any:
        total, dq = state
        k, v = (tile.gather(x, block, shown.seen) for x in (blocks.k, blocks.v))
        factor = pairs.factor(fixed.at, block, lse.dtype)
        p, ds = score_gradient(fixed, k, v, shown, factor, group, call)
        dq += tile.batched_dot(ds, k, contract=(1, 0))
        dk, dv = add_keys(total[1:], (ds, p), (fixed.q, fixed.do), block)
        return total._replace(dk=dk, dv=dv), dq

    def close(fixed: GradientRow, state: Any, row: Array) -> Gradients:
        del fixed
        total, dq = state
        return total._replace(dq=tile.put_queries(total.dq, dq, row))

    total = Gradients(
        jnp.zeros_like(blocks.q),
        *(
            jnp.zeros((batch, kv_heads, n, d, size_kv), lse.dtype)
            for _, n, size_kv, _, d in (blocks.k.shape, blocks.v.shape)
        ),
    )
    walk = plan.walks[heads.map_index]
    total = vary(total, inputs.q)
    total = fold_rows(walk, pairs, Pass(start, fold, close), total)
    dq = tile.heads_first(total.dq, q_seq_len)
    dk, dv = (tile.from_blocks(jnp.swapaxes(x, 3, 4), 2, kv_seq_len) for x in total[1:])
    return dq, dk, dv


def score_gradient(
    row: GradientRow,
    k: Float[Array, "b h k d"],
    v: Float[Array, "b h k dv"],
    shown: tile.Shown,
    factor: Float[Array, "..."] | None,
    group: int,
    call: Call,
) -> tuple[Float[Array, "b h gq k"], Float[Array, "b h gq k"]]:
    """``p`` and the gradient of ``q k^T``, for some blocks of a row.

    The arguments are those of ``gradient_of_added``.
    """
    s, p, ds = gradient_of_added(row, k, v, shown, factor, group, call)
    ds *= call.sm_scale * softmax.cap_slope(s, call.logits_soft_cap, call.unit)
    flat = *row.q.shape[:-1], s.shape[-1]
    return p.reshape(flat), ds.reshape(flat)


def gradient_of_added(
    row: GradientRow,
    k: Float[Array, "b h k d"],
    v: Float[Array, "b h k dv"],
    shown: tile.Shown,
    factor: Float[Array, "..."] | None,
    group: int,
    call: Call,
) -> tuple[
    Float[Array, "b h g q k"], Float[Array, "b h g q k"],
    Float[Array, "b h g q k"],
]:  # fmt: skip
    """Capped scores, ``p``, and the gradient of the values added to capped scores.

    ``shown`` has the allowed pairs, ``factor`` is the dropout factor, and ``group`` the
    number of query heads per key head.
    """
    s = tile.scores(row.q * call.scale, k, group, call)
    dp = tile.batched_dot(row.do, v, contract=(1, 1)).reshape(s.shape)
    lse, delta = (x.reshape(*s.shape[:-1], 1) for x in (row.lse, row.delta))
    p, ds = softmax.score_gradient(
        tile.masked(s, shown), lse, dp, delta, factor=factor, unit=call.unit
    )
    return s, p, ds


def add_keys(
    totals: tuple[Float[Array, "b h blocks d k"], ...],
    gradients: tuple[Float[Array, "b h _ slots_k"], ...],
    queries: tuple[Float[Array, "b h _ d"], ...],
    block: Int32[Array, " slots"],
) -> tuple[Float[Array, "b h blocks d k"], ...]:
    """Adds ``queries^T gradients`` to the blocks of keys of ``block``, in order.

    Padding adds zeros to a block that the row visits anyway. One loop adds to all
    ``totals``: each loop is more to compile.
    """

    def product(queries: jax.Array, gradient: jax.Array) -> jax.Array:
        # queries^T gradient transposes the smaller operand, unlike gradient^T queries.
        # The barrier keeps XLA from fusing the transpose into the product, which is
        # slower.
        turned = jax.lax.optimization_barrier(jnp.swapaxes(queries, 2, 3))
        return tile.batched_dot(turned, gradient, contract=(1, 0))

    tiles = tuple(map(product, queries, gradients))

    def add(
        i: Int32[Array, ""], totals: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        at = block[i]

        def one(total: jax.Array, tiles: jax.Array) -> jax.Array:
            size = total.shape[-1]
            old = jax.lax.dynamic_index_in_dim(total, at, 2, keepdims=False)
            new = jax.lax.dynamic_slice_in_dim(tiles, i * size, size, 3)
            return jax.lax.dynamic_update_index_in_dim(total, old + new, at, 2)

        return tuple(map(one, totals, tiles))

    return repeat(len(block), add, totals)
