"""The forward kernel: one query block per grid step, with its key blocks by DMA.

It is the forward pass of FlashAttention-2 (Dao, 2023, algorithm 1) over the key blocks
that the plan lists, as in block-sparse FlashAttention (Dao et al., 2022, section 3.3).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import bits, softmax
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, Inputs, Kept, Vectors
from pallas_kernels.pages import Pages
from pallas_kernels.tpu import operands
from pallas_kernels.tpu.batching import Arrays, foldable
from pallas_kernels.tpu.launch import Launch, launch
from pallas_kernels.tpu.operands import PairOperands, SideOperands
from pallas_kernels.tpu.pair_test import PairTest, pair_test
from pallas_kernels.tpu.plans import TpuLists
from pallas_kernels.tpu.runs import LANES, TpuPlan
from pallas_kernels.tpu.scores import AddedScores, added_scores, pair_operands
from pallas_kernels.tpu.walk import BlockOperand, Step
from pallas_kernels.varying import shape_like

# Tiles of more keys take products as scores. On a v6e this saves 9 % of the bundles of
# a full tile of 512 x 1024, and costs 2 % at 512 x 512 and 8 % at 1024 x 512.
WIDE = 512


def forward(inputs: Inputs, vectors: Vectors, lists: TpuLists, call: Call) -> Kept:
    """Attention over the blocks of ``lists.forward``; see ``call.Backend.forward``."""
    q_seq_len, dtype = inputs.q.shape[2], inputs.q.dtype
    bits.check(vectors.bits, *((x.sizes.block_q, x.sizes.block_kv) for x in lists))
    vectors = operands.with_batch_and_heads(vectors)
    run = foldable(partial(forward_rows, call=call))
    found = run(operands.prepared(inputs), vectors, lists.forward)
    o, lse, total = (x[:, :, :q_seq_len] for x in found)
    return Kept(o.astype(dtype), lse, total)


def forward_rows(
    arrays: Arrays,
    vectors: Vectors,
    plan: TpuPlan,
    *,
    call: Call,
    pages: Pages | None = None,
) -> Arrays:
    """``o``, ``lse`` and ``total`` with the padded rows of the plan.

    With ``pages``, ``k`` and ``v`` are ``[pages, kv_heads, page size, dim]``.
    """
    (q, k, v), sizes = arrays, plan.sizes
    if sizes.block_kv > WIDE:
        call = call.with_raw_scores()
    batch, num_heads, _, _ = q.shape
    heads, group, head_dim_v = batch * num_heads, num_heads // k.shape[1], v.shape[3]
    seq = sizes.num_rows * sizes.block_q

    # The shape of m and l: whole registers, unless the tile is narrower (which only the
    # interpreter allows).
    statistics = (sizes.block_q, 1 if sizes.block_kv % LANES else LANES)

    def own(h: Any, _: Any) -> Any:
        return h

    def kv_head(h: Any, _: Any) -> Any:
        return lax.div(h, jnp.int32(group))

    def side(of: Axis, block: int) -> SideOperands:
        return operands.side_operands(vectors, of, block, (batch, num_heads), 1, by="q")

    def stream(x: jax.Array) -> BlockOperand:
        heads = None if pages is None else x.shape[1]
        array = operands.flat(x, sizes.block_kv)
        return BlockOperand(array, kv_head, page_heads=heads)

    of = Launch(
        name="sadsl_forward",
        heads=heads,
        row_block=sizes.block_q,
        stream_block=sizes.block_kv,
        rows=(
            BlockOperand(operands.flat(q, sizes.block_q), own),
            side("q", sizes.block_q),
        ),
        streams=(
            stream(k),
            None if call.values else stream(v),
            side("kv", sizes.block_kv),
        ),
        tiles=pair_operands(vectors, sizes, (batch, num_heads), 1, by="q"),
        outs=(
            BlockOperand(shape_like((heads, seq, head_dim_v), q.dtype, q), own),
            BlockOperand(shape_like((heads, 1, seq), jnp.float32, q), own, axis=2),
            BlockOperand(shape_like((heads, 1, seq), jnp.float32, q), own, axis=2),
        ),
        scratch=((sizes.block_q, head_dim_v), statistics, statistics),
        interpret=call.interpret,
        pages=pages,
    )
    added = added_scores(vectors.scores, call, sizes, "q")
    test = pair_test(vectors, call, sizes, "q")
    kernel = partial(_kernel, call=call, added_scores=added, test_pairs=test)
    o, lse, total = launch(kernel, of, plan)
    shape = (batch, num_heads, seq)
    return o.reshape(*shape, head_dim_v), lse.reshape(shape), total.reshape(shape)


def _kernel(
    step: Step,
    rows: tuple,
    outs: tuple,
    scratch: tuple,
    *,
    call: Call,
    added_scores: AddedScores,
    test_pairs: PairTest,
) -> None:
    """Computes ``o [block_q, head_dim_v]`` and f32 ``lse, total [1, block_q]``.

    ``rows`` are ``q [block_q, head_dim]`` and its ``SideOperands``; a tile reads ``k
    [block_kv, head_dim]``, ``v [block_kv, head_dim_v]`` (None if it is in ``k``), their
    ``SideOperands``, and ``PairOperands``. ``scratch`` is the ``softmax.Carry``.
    """
    q_ref, q_side_refs = rows
    o_ref, lse_ref, total_ref = outs
    sizes = added_scores.sizes
    assert q_ref.shape[0] == sizes.block_q
    assert o_ref.shape == scratch[0].shape
    assert lse_ref.shape == total_ref.shape == (1, sizes.block_q)
    q_columns = operands.columns_of(q_side_refs)

    def store(carry: softmax.Carry) -> None:
        for ref, value in zip(scratch, carry, strict=True):
            ref[...] = value

    def visit(
        block: jax.Array, refs: tuple, tiles: PairOperands, full: bool, *, careful: bool
    ) -> None:
        k_ref, v_ref, kv_side_refs = refs
        k, kv_side = k_ref[...], operands.values_of(kv_side_refs)
        q_side = operands.across(q_columns, k.shape[0])
        v = operands.tile_values(k, v_ref, call)
        s = call.scaled(softmax.dot(q_ref[...], k, contract=(1, 1)))
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        pairs = None
        if not full:
            sides = q_side, kv_side
            pairs = test_pairs(step, block, sides, tiles.words)
        values = q_side.scores, kv_side.scores
        added, pairs = added_scores(step, block, values, tiles.scores, pairs)
        s = s if added is None else s + added
        s = test_pairs.masked(s, pairs, careful)
        if careful:
            v = operands.rows_kept(v, operands.to_column(softmax.seen(s, 0)))
        factor = operands.dropout_factor(call, q_side.seeds, kv_side.seeds)
        carry = softmax.Carry(*(ref[...] for ref in scratch))
        store(softmax.fold(carry, s, v, factor, call.unit))

    def fold_row(careful: bool) -> None:
        store(softmax.start(*scratch[0].shape, lanes=scratch[1].shape[1]))
        step.visit_blocks(partial(visit, careful=careful), careful)

    fold_row(careful=False)
    # A value that is not finite makes the sums of all rows of its tile not finite, so
    # the rows of one register are enough to check. With a bias, a score that is not
    # finite affects only the rows that do not remove it, and bounds leave the NaN of a
    # query without keys in its row: then all rows are checked.
    every = call.scores is not None or test_pairs.several
    told_by = scratch[0].shape[0] if every else min(8, scratch[0].shape[0])

    @pl.when(jnp.logical_not(softmax.all_finite(scratch[0][:told_by])))
    def _() -> None:
        fold_row(careful=True)

    found = softmax.finish(softmax.Carry(*(ref[...] for ref in scratch)), call.unit)
    o_ref[...] = found.o.astype(o_ref.dtype)
    lse_ref[...] = operands.to_row(found.lse)
    total_ref[...] = operands.to_row(found.total)
