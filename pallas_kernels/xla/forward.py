"""The forward pass: a scan over query blocks, for each shape of row.

A short row takes one softmax over all its keys. A longer row takes some blocks at a
time with the online softmax (Milakov and Gimelshein, 2018).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import softmax
from pallas_kernels.call import Call, Inputs, Kept, Vectors
from pallas_kernels.precision import wide
from pallas_kernels.varying import vary
from pallas_kernels.xla import tile
from pallas_kernels.xla.heads import HeadGroup, head_groups, join
from pallas_kernels.xla.rows import Pass, fold_rows
from pallas_kernels.xla.traced_walks import Owner, for_owners, is_traced
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan


def fold_tiles(
    unit: float,
    state: softmax.Carry,
    s: Array,
    v: Array,
    factor: Array | None = None,
    real: Array | None = None,
) -> softmax.Carry:
    """``softmax.fold`` for each batch entry and key head; they share ``real``."""
    fold = partial(softmax.fold, unit=unit, real=real)
    return jax.vmap(jax.vmap(fold))(state, s, v, factor)


def forward(inputs: Inputs, vectors: Vectors, lists: XlaLists, call: Call) -> Kept:
    """Attention over the blocks of ``lists.forward``, in linear memory."""
    if is_traced(lists):

        def of_owner(owner: Owner) -> Kept:
            args = owner.inputs, owner.vectors, owner.plan(lists.forward)
            return _forward(*args, owner.heads, call)

        return Kept(*for_owners(of_owner, inputs, vectors, lists))
    groups = head_groups(lists.map_of_head, lists.test_of_map, inputs.k.shape[1])
    parts = [_forward(inputs, vectors, lists.forward, heads, call) for heads in groups]
    q_heads = [heads.q_heads for heads in groups]
    return Kept(*(join(list(x), q_heads) for x in zip(*parts, strict=True)))


def _forward(
    inputs: Inputs, vectors: Vectors, plan: XlaPlan, heads: HeadGroup, call: Call
) -> Kept:
    """The results of the heads of one group."""
    _, _, q_seq_len, _ = inputs.q.shape
    _, _, kv_seq_len, head_dim_v = inputs.v.shape
    blocks = tile.operands(inputs, heads, plan)
    pairs = tile.pairs_of(call, vectors, heads, plan, (q_seq_len, kv_seq_len))
    batch, q_blocks, block_q, q_heads, _ = blocks.q.shape
    kv_heads = len(heads.kv_heads)
    group, dtype = q_heads // kv_heads, wide(inputs.q.dtype)

    def start(total: Any, row: Array) -> tuple[Any, Any]:
        q = tile.queries_of(blocks.q, row, kv_heads)
        q *= call.scale
        empty = softmax.start(group * block_q, head_dim_v, dtype=dtype)
        lead = batch, kv_heads
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), empty)
        return (q, total, row), vary(state, q)

    def fold(fixed: Any, state: Any, block: Array, shown: tile.Shown) -> Any:
        q, _, row = fixed
        s = tile.scores(q, tile.gather(blocks.k, block), group, call)
        # Copies do not change a maximum, so their weights may be removed later, in the
        # loop that computes the weights: that saves one pass over the tile.
        copies = shown.padding and shown.added is None
        s = (s if copies else tile.masked(s, shown)).reshape(*q.shape[:-1], s.shape[-1])
        v = tile.gather(blocks.v, block, shown.seen)
        factor = pairs.factor(row, block, dtype)
        if factor is not None:
            factor = tile.for_all(factor, group, s.shape)
        real = (shown.limit[0, 0, 0] > 0).astype(dtype) if copies else None
        return fold_tiles(call.unit, state, s, v, factor, real)

    def close(fixed: Any, state: Any, row: Array) -> Any:
        o, lse, weights = softmax.finish(state, call.unit)
        _, total, _ = fixed
        return Kept(
            tile.put_queries(total.o, o, row),
            tile.put_row(total.lse, lse[..., 0], row),
            tile.put_row(total.total, weights[..., 0], row),
        )

    total = Kept(
        jnp.zeros((batch, q_blocks, block_q, q_heads, head_dim_v), inputs.q.dtype),
        jnp.full((batch, kv_heads, group, q_blocks, block_q), -jnp.inf, dtype),
        jnp.ones((batch, kv_heads, group, q_blocks, block_q), dtype),
    )
    walk = plan.walks[heads.map_index]
    total = vary(total, inputs.q)
    total = fold_rows(walk, pairs, Pass(start, fold, close), total)
    lse, weights = (
        tile.from_blocks(x, 3, q_seq_len).reshape(batch, q_heads, -1)
        for x in (total.lse, total.total)
    )
    return Kept(tile.heads_first(total.o, q_seq_len), lse, weights)
