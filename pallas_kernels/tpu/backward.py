"""The backward kernel: dq, dk and dv in one walk by key blocks, 5 products a tile.

The weights are computed again from the lse, as in FlashAttention-2 (Dao, 2023,
algorithm 2). That algorithm adds to dq in HBM from all key blocks. Here dq of a segment
of queries stays in VMEM (``segments``), so no grid step waits for another and results
repeat bit by bit.

Queries and their cotangents are streamed transposed, ``[dim, block_q]``, and all sums
are transposed. Each product then has the tile ``[keys, queries]`` as its larger
operand, and no tile is transposed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import softmax
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, Cotangents, Inputs, Vectors
from pallas_kernels.tpu import operands
from pallas_kernels.tpu.backward_launch import BackwardLaunch, BackwardSums, launch
from pallas_kernels.tpu.batching import Arrays, foldable
from pallas_kernels.tpu.operands import PairOperands, SideOperands
from pallas_kernels.tpu.pair_test import PairTest, pair_test
from pallas_kernels.tpu.plans import TpuLists
from pallas_kernels.tpu.scores import AddedScores, added_scores, pair_operands
from pallas_kernels.tpu.segments import BackwardPlan
from pallas_kernels.tpu.walk import BlockOperand, Step
from pallas_kernels.varying import shape_like


def backward(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: TpuLists,
    call: Call,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """``dq, dk, dv`` over the blocks of ``lists.backward``."""
    call, vectors = call.with_raw_scores(), operands.with_batch_and_heads(vectors)
    q, k, v = operands.prepared(inputs)
    do = cotangents.do.astype(q.dtype)
    lse = softmax.lse_for_backward(cotangents.lse, call.unit)
    # The kernel reads both as rows, so one array holds them: [batch, heads, 2, q].
    statistics = jnp.stack([lse, cotangents.delta], axis=2)
    arrays = (q, k, v, do, statistics)
    run = foldable(partial(_run, call=call))
    found = run(arrays, vectors, lists.backward)
    dq, dk, *dv = (
        x[:, :, : y.shape[2]].astype(y.dtype)
        for x, y in zip(found, inputs, strict=False)
    )
    return dq, dk, dv[0] if dv else None


def _statistics(x: jax.Array, length: int) -> jax.Array:
    """``[batch, heads, 2, q]`` as ``[batch * heads, 2, length]``."""
    # With this lse the weights of padded queries are 0 for any score.
    fill = jnp.array([softmax.ABSENT, 0.0], jnp.float32)[:, None]
    fill = jnp.broadcast_to(fill, (*x.shape[:3], length - x.shape[3]))
    x = jnp.concatenate([x, fill], axis=3)
    return x.reshape(-1, *x.shape[2:])


def _transposed(x: jax.Array, block: int) -> jax.Array:
    """``[batch, heads, seq, dim]`` as ``[batch * heads, dim, padded seq]``."""
    return jnp.swapaxes(operands.flat(x, block), 1, 2)


def _run(arrays: Arrays, vectors: Vectors, plan: BackwardPlan, *, call: Call) -> Arrays:
    q, k, v, do, statistics = arrays
    sizes, parts = plan.sizes, plan.segments
    block_q, block_kv = sizes.block_q, sizes.block_kv
    batch, num_heads, _, head_dim = q.shape
    _, num_kv_heads, _, head_dim_v = v.shape
    heads, group = (batch, num_heads), num_heads // num_kv_heads
    assert group == parts.group

    def own(h: Any, _: Any) -> Any:
        return h

    def query_head(h: Any, member: Any) -> Any:
        return h * group + member

    def side(of: Axis, block: int) -> SideOperands:
        return operands.side_operands(vectors, of, block, heads, group, by="kv")

    # With values among the keys, dk is the sum of both gradients, which are scaled
    # before they are added.
    dims = (head_dim, head_dim_v) if call.values is None else (head_dim,)
    scale = call.sm_scale if call.values is None else 1.0
    scales = (scale, scale, 1.0)[: 1 + len(dims)]
    several = parts.count > 1
    flat_q, flat_do = (_transposed(x, block_q) for x in (q, do))
    q_len, kv_len = parts.of_head * parts.blocks * block_q, sizes.num_rows * block_kv
    key_heads = batch * num_kv_heads
    of = BackwardLaunch(
        key_heads=key_heads,
        rows=(
            BlockOperand(operands.flat(k, block_kv), own),
            operands.value_operand(v, block_kv, own, call),
            side("kv", block_kv),
        ),
        streams=(
            BlockOperand(flat_q, query_head, axis=2),
            BlockOperand(flat_do, query_head, axis=2),
            BlockOperand(_statistics(statistics, flat_q.shape[2]), query_head, axis=2),
            side("q", block_q),
        ),
        tiles=pair_operands(vectors, sizes, heads, group, by="kv"),
        dq=shape_like((batch * num_heads, head_dim, q_len), q.dtype, q),
        of_keys=tuple(
            shape_like((key_heads, dim, kv_len), jnp.float32 if several else k.dtype, q)
            for dim in dims
        ),
        scales=scales,
        interpret=call.interpret,
    )
    kernel = partial(
        _kernel,
        call=call,
        added_scores=added_scores(vectors.scores, call, sizes, "kv"),
        test_pairs=pair_test(vectors, call, sizes, "kv"),
    )
    dq, *of_keys = launch(kernel, of, plan)
    if several:
        pairs = zip(of_keys, scales[1:], strict=True)
        of_keys = [(x * scale).astype(k.dtype) for x, scale in pairs]
    return tuple(
        jnp.swapaxes(x, 1, 2).reshape(batch, -1, x.shape[2], x.shape[1])
        for x in (dq, *of_keys)
    )


def _kernel(
    step: Step,
    rows: tuple,
    sums: BackwardSums,
    *,
    call: Call,
    added_scores: AddedScores,
    test_pairs: PairTest,
) -> None:
    """Adds the tiles of a key block to dq, and to dk and dv, all transposed.

    ``rows`` are ``k [block_kv, head_dim]``, ``v [block_kv, head_dim_v]`` and their
    ``SideOperands``. If values are channels of ``k``, there is no ``v``, and dk has the
    sum of both. A tile ``[block_kv, block_q]`` reads ``q [head_dim, block_q]``, ``do
    [head_dim_v, block_q]``, ``[2, block_q]`` (f32 ``lse`` and ``delta``),
    ``SideOperands`` and ``PairOperands``.
    """
    k_ref, v_ref, kv_side_refs = rows
    dk_ref, *dv_refs = sums.of_keys
    dv_ref = dv_refs[0] if dv_refs else dk_ref.at[slice(*call.values)]
    kv_columns = operands.columns_of(kv_side_refs)

    @pl.when(sums.new_keys)
    def _() -> None:
        sums.keys[...] = k_ref[...].T

    def visit(
        block: jax.Array, refs: tuple, tiles: PairOperands, full: bool, *, careful: bool
    ) -> None:
        q_ref, do_ref, statistics_ref, q_side_refs = refs
        q, do, statistics = q_ref[...], do_ref[...], statistics_ref[...]
        q_side = operands.values_of(q_side_refs)
        kv_side = operands.across(kv_columns, q.shape[1])
        s = call.scaled(softmax.dot(k_ref[...], q, contract=(1, 0)))
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        dp = softmax.dot(operands.tile_values(k_ref, v_ref, call), do, contract=(1, 0))
        pairs = None
        if not full:
            pairs = test_pairs(step, block, (q_side, kv_side), tiles.words)
        values = q_side.scores, kv_side.scores
        added, pairs = added_scores(step, block, values, tiles.scores, pairs)
        factor = operands.dropout_factor(call, q_side.seeds, kv_side.seeds)
        lse, delta = statistics[0:1], statistics[1:2]
        added = s if added is None else s + added
        total = test_pairs.masked(added, pairs, careful)
        slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
        p, ds = softmax.score_gradient(
            total, lse, dp, delta,
            factor=factor, slope=slope, unit=call.unit, careful=careful,
        )  # fmt: skip
        if call.values is not None:
            ds = ds * call.sm_scale
        ds = ds.astype(q.dtype)
        keys = sums.keys[...]
        if careful:
            seen = operands.to_row(softmax.seen(total, 1).astype(jnp.float32)) > 0
            keys = jnp.where(seen, keys, jnp.zeros_like(keys))
        dv_ref[...] += softmax.dot(do, p.astype(do.dtype), contract=(1, 1))
        dk_ref[...] += softmax.dot(q, ds, contract=(1, 1))
        dq_ref = sums.dq_of(block)
        dq_ref[...] += softmax.dot(keys, ds, contract=(1, 0))

    # ``0 * nan`` is NaN, and products of huge numbers are infinite: such keys need a
    # test in each tile.
    usual = softmax.all_moderate(k_ref[...].astype(jnp.float32))
    if v_ref is not None:
        usual &= softmax.all_moderate(v_ref[...].astype(jnp.float32))

    @pl.when(usual)
    def _() -> None:
        step.visit_blocks(partial(visit, careful=False))

    @pl.when(jnp.logical_not(usual))
    def _() -> None:
        step.visit_blocks(partial(visit, careful=True), True)
