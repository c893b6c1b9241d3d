"""The backward kernels: one computes dq by query blocks, one dk and dv by key blocks.

The weights are computed again from the lse, as in FlashAttention-2 (Dao, 2023,
algorithm 2). That algorithm adds to dq from all key blocks. Here dq has a kernel of its
own, so no grid step writes memory of another and results repeat bit by bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import softmax
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, Cotangents, Inputs, Vectors
from pallas_kernels.tpu import operands
from pallas_kernels.tpu.batching import Arrays, foldable
from pallas_kernels.tpu.launch import BlockOperand, Launch, Step, launch
from pallas_kernels.tpu.operands import PairOperands, SideOperands
from pallas_kernels.tpu.pair_test import PairTest, pair_test
from pallas_kernels.tpu.runs import TpuLists, TpuPlan
from pallas_kernels.tpu.scores import AddedScores, added_scores, pair_operands
from pallas_kernels.varying import shape_like


def backward(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: TpuLists,
    call: Call,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """``dq, dk, dv`` over the blocks of ``lists.dq`` and ``lists.dkv``."""
    vectors = operands.with_batch_and_heads(vectors)
    q, k, v = operands.prepared(inputs)
    do = cotangents.do.astype(q.dtype)
    lse = softmax.lse_for_backward(cotangents.lse, call.unit)
    # The kernels read both as rows, so one array holds them: [batch, heads, 2, q].
    statistics = jnp.stack([lse, cotangents.delta], axis=2)
    arrays = (q, k, v, do, statistics)
    (dq,) = foldable(partial(_run_dq, call=call))(arrays, vectors, lists.dq)
    of_keys = foldable(partial(_run_dkv, call=call))(arrays, vectors, lists.dkv)
    dq, dk, *dv = (
        x[:, :, : y.shape[2]].astype(y.dtype)
        for x, y in zip((dq, *of_keys), inputs, strict=False)
    )
    return dq, dk, dv[0] if dv else None


def _statistics(x: jax.Array, block: int) -> jax.Array:
    """``[batch, heads, 2, q]`` as ``[batch * heads, 2, padded q]``."""
    # With this lse the weights of padded queries are 0 for any score.
    fill = jnp.array([softmax.ABSENT, 0.0], jnp.float32)[:, None]
    short = -x.shape[3] % block
    fill = jnp.broadcast_to(fill, (*x.shape[:3], short))
    x = jnp.concatenate([x, fill], axis=3)
    return x.reshape(-1, *x.shape[2:])


def _run_dq(arrays: Arrays, vectors: Vectors, plan: TpuPlan, *, call: Call) -> Arrays:
    q, k, v, do, statistics = arrays
    sizes = plan.sizes
    block_q, block_kv = sizes.block_q, sizes.block_kv
    batch, num_heads, _, head_dim = q.shape
    heads, group = batch * num_heads, num_heads // k.shape[1]
    seq = sizes.num_rows * block_q

    def own(h: jax.Array, _: jax.Array) -> jax.Array:
        return h

    def kv_head(h: jax.Array, _: jax.Array) -> jax.Array:
        return lax.div(h, jnp.int32(group))

    def side(of: Axis, block: int) -> SideOperands:
        return operands.side_operands(vectors, of, block, (batch, num_heads), 1, by="q")

    of = Launch(
        name="sadsl_dq",
        heads=heads,
        members=1,
        row_block=block_q,
        stream_block=block_kv,
        rows=(
            BlockOperand(operands.flat(q, block_q), own),
            BlockOperand(operands.flat(do, block_q), own),
            BlockOperand(_statistics(statistics, block_q), own, axis=2),
            side("q", block_q),
        ),
        streams=(
            BlockOperand(operands.flat(k, block_kv), kv_head),
            operands.value_operand(v, block_kv, kv_head, call),
            side("kv", block_kv),
        ),
        tiles=pair_operands(vectors, sizes, (batch, num_heads), 1, by="q"),
        outs=(BlockOperand(shape_like((heads, seq, head_dim), q.dtype, q), own),),
        scratch=((block_q, head_dim),),
        interpret=call.interpret,
    )
    added = added_scores(vectors.scores, call, sizes, "q")
    test = pair_test(vectors, call, sizes, "q")
    kernel = partial(_dq_kernel, call=call, added_scores=added, test_pairs=test)
    (dq,) = launch(kernel, of, plan)
    return (dq.reshape(batch, num_heads, seq, head_dim),)


def _dq_kernel(
    step: Step,
    rows: tuple,
    outs: tuple,
    scratch: tuple,
    *,
    call: Call,
    added_scores: AddedScores,
    test_pairs: PairTest,
) -> None:
    """Computes ``dq [block_q, head_dim]``, the sum over the key blocks of the row.

    ``rows`` are ``q [block_q, head_dim]``, ``do [block_q, head_dim_v]``, ``[2,
    block_q]`` (f32 ``lse`` and ``delta``) and ``SideOperands``. A tile ``[block_q,
    block_kv]`` reads ``k [block_kv, head_dim]``, ``v [block_kv, head_dim_v]``,
    ``SideOperands`` and ``PairOperands``.
    """
    q_ref, do_ref, statistics_ref, q_side_refs = rows
    (dq_ref,) = scratch
    assert q_ref.shape == dq_ref.shape == outs[0].shape
    assert statistics_ref.shape == (2, q_ref.shape[0])
    lse = operands.to_column(statistics_ref[0:1])
    delta = operands.to_column(statistics_ref[1:2])
    q_side = operands.columns_of(q_side_refs)

    def visit(
        block: jax.Array, refs: tuple, tiles: PairOperands, full: bool, *, careful: bool
    ) -> None:
        k_ref, v_ref, kv_side_refs = refs
        k, kv_side = k_ref[...], operands.values_of(kv_side_refs)
        v = operands.tile_values(k, v_ref, call)
        s = softmax.dot(q_ref[...], k, contract=(1, 1)) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        dp = softmax.dot(do_ref[...], v, contract=(1, 1))
        pairs = None
        if not full:
            sides = q_side, kv_side
            pairs = test_pairs(step, block, sides, tiles.words)
        values = q_side.scores, kv_side.scores
        added, pairs = added_scores(step, block, values, tiles.scores, pairs)
        factor = operands.dropout_factor(call, q_side.seeds, kv_side.seeds)
        total = softmax.mask(s if added is None else s + added, pairs)
        slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
        _, ds = softmax.score_gradient(
            total, lse, dp, delta,
            factor=factor, slope=slope, unit=call.unit, careful=careful,
        )  # fmt: skip
        if careful:
            k = operands.rows_kept(k, operands.to_column(softmax.seen(total, 0)))
        dq_ref[...] += softmax.dot(ds.astype(k.dtype), k, contract=(1, 0))

    def add_row(careful: bool) -> None:
        dq_ref[...] = jnp.zeros_like(dq_ref)
        step.visit_blocks(partial(visit, careful=careful), careful)

    add_row(careful=False)

    @pl.when(jnp.logical_not(softmax.all_finite(dq_ref[...])))
    def _() -> None:
        add_row(careful=True)

    outs[0][...] = (dq_ref[...] * call.sm_scale).astype(outs[0].dtype)


def _run_dkv(arrays: Arrays, vectors: Vectors, plan: TpuPlan, *, call: Call) -> Arrays:
    q, k, v, do, statistics = arrays
    sizes = plan.sizes
    block_q, block_kv = sizes.block_q, sizes.block_kv
    batch, num_heads, _, head_dim = q.shape
    _, num_kv_heads, _, head_dim_v = v.shape
    heads, group = batch * num_kv_heads, num_heads // num_kv_heads
    seq = sizes.num_rows * block_kv
    dims = (head_dim, head_dim_v) if call.values is None else (head_dim,)

    def own(h: jax.Array, _: jax.Array) -> jax.Array:
        return h

    def query_head(h: jax.Array, member: jax.Array) -> jax.Array:
        return h * group + member

    def side(of: Axis, block: int) -> SideOperands:
        return operands.side_operands(
            vectors, of, block, (batch, num_heads), group, by="kv"
        )

    of = Launch(
        name="sadsl_dkv",
        heads=heads,
        members=group,
        row_block=block_kv,
        stream_block=block_q,
        rows=(
            BlockOperand(operands.flat(k, block_kv), own),
            operands.value_operand(v, block_kv, own, call),
            side("kv", block_kv),
        ),
        streams=(
            BlockOperand(operands.flat(q, block_q), query_head),
            BlockOperand(operands.flat(do, block_q), query_head),
            BlockOperand(_statistics(statistics, block_q), query_head, axis=2),
            side("q", block_q),
        ),
        tiles=pair_operands(vectors, sizes, (batch, num_heads), group, by="kv"),
        outs=tuple(
            BlockOperand(shape_like((heads, seq, dim), k.dtype, q), own) for dim in dims
        ),
        scratch=tuple((block_kv, dim) for dim in dims),
        interpret=call.interpret,
    )
    added = added_scores(vectors.scores, call, sizes, "kv")
    test = pair_test(vectors, call, sizes, "kv")
    kernel = partial(
        _dkv_kernel, call=call, added_scores=added, test_pairs=test, last=group - 1
    )
    found = launch(kernel, of, plan)
    return tuple(x.reshape(batch, num_kv_heads, seq, -1) for x in found)


def _dkv_kernel(
    step: Step, rows: tuple, outs: tuple, scratch: tuple, *,
    call: Call, added_scores: AddedScores, test_pairs: PairTest, last: int,
) -> None:  # fmt: skip
    """Computes ``dk [block_kv, head_dim]`` and ``dv [block_kv, head_dim_v]``.

    Both are sums over the query blocks of the row and over the query heads of the
    group. ``rows`` are ``k``, ``v`` and their ``SideOperands``. If values are channels
    of ``k``, there is no ``v``, and ``dk`` has the sum of both. A tile ``[block_kv,
    block_q]`` reads ``q [block_q, head_dim]``, ``do [block_q, head_dim_v]``, ``[2,
    block_q]`` (f32 ``lse`` and ``delta``), ``SideOperands`` and ``PairOperands``.
    """
    k_ref, v_ref, kv_side_refs = rows
    dk_ref, *dv_ref = scratch
    assert k_ref.shape == dk_ref.shape == outs[0].shape
    assert call.values or v_ref.shape == dv_ref[0].shape == outs[1].shape
    kv_side = operands.columns_of(kv_side_refs)

    @pl.when(step.member == 0)
    def _() -> None:
        for ref in scratch:
            ref[...] = jnp.zeros_like(ref)

    def visit(block: jax.Array, refs: tuple, tiles: PairOperands, full: bool) -> None:
        # The tile is [keys, queries]: no product then needs a transposed left operand.
        q_ref, do_ref, statistics_ref, q_side_refs = refs
        q, do, statistics = q_ref[...], do_ref[...], statistics_ref[...]
        q_side = operands.values_of(q_side_refs)
        s = softmax.dot(k_ref[...], q, contract=(1, 1)) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        v = operands.tile_values(k_ref, v_ref, call)
        dp = softmax.dot(v, do, contract=(1, 1))
        pairs = None
        if not full:
            sides = q_side, kv_side
            pairs = test_pairs(step, block, sides, tiles.words)
        values = q_side.scores, kv_side.scores
        added, pairs = added_scores(step, block, values, tiles.scores, pairs)
        factor = operands.dropout_factor(call, q_side.seeds, kv_side.seeds)
        lse, delta = statistics[0:1], statistics[1:2]
        total = softmax.mask(s if added is None else s + added, pairs)
        slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
        p, ds = softmax.score_gradient(
            total, lse, dp, delta,
            factor=factor, slope=slope, unit=call.unit,
            careful=not full or call.scores is not None,
        )  # fmt: skip
        dv = softmax.dot(p.astype(do.dtype), do, contract=(1, 0))
        if call.values is None:
            dv_ref[0][...] += dv
        else:
            dk_ref[:, slice(*call.values)] += dv
            # Both have one sum, so the scale cannot wait for its end.
            ds = ds * call.sm_scale
        dk_ref[...] += softmax.dot(ds.astype(q.dtype), q, contract=(1, 0))

    step.visit_blocks(visit)

    @pl.when(step.member == last)
    def _() -> None:
        scale = call.sm_scale if call.values is None else 1.0
        outs[0][...] = (dk_ref[...] * scale).astype(outs[0].dtype)
        for out, ref in zip(outs[1:], dv_ref, strict=True):
            out[...] = ref[...].astype(out.dtype)
