"""The backward kernels: one computes dq by query blocks, one dk and dv by key blocks.

The weights are computed again from the lse, as in FlashAttention-2 (Dao, 2023,
algorithm 2). That algorithm adds to dq by atomics. Here dq has a kernel of its own, so
results repeat bit by bit.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import softmax
from pallas_kernels.call import Call, Cotangents, Inputs, Vectors
from pallas_kernels.loops import repeat
from pallas_kernels.triton import channels
from pallas_kernels.triton.channels import Parts
from pallas_kernels.triton.launch import (
    compiler_params,
    everything,
    heads_first,
    input_specs,
    pad_cotangents,
    pad_inputs,
    pad_vectors,
    vector_specs,
    whole,
)
from pallas_kernels.triton.runs import (
    Runs,
    TritonLists,
    TritonPlan,
    TritonSizes,
    allowed,
    along,
    bit_tiles,
    block_ids,
    first_of_batch,
    fold_runs,
    fold_runs_tested,
    map_and_test,
    rows_kept,
)
from pallas_kernels.triton.scores import Here, added_scores, dropout_factor, not_removed
from pallas_kernels.varying import shape_like


def dq_kernel(
    runs: Runs, inputs: Inputs, cotangents: Cotangents, vectors: Vectors, dq_ref: Any,
    *, sizes: TritonSizes, call: Call, num_heads: int,
) -> None:  # fmt: skip
    """Writes one query block of ``dq``.

    The refs have one batch entry and head: ``q, dq [padded_q, head_dim]``, ``k
    [padded_kv, head_dim]``, ``v [padded_kv, head_dim_v]``, ``do [padded_q,
    head_dim_v]``, f32 ``lse`` and ``delta [padded_q]``.
    """
    q_ref, k_ref, v_ref = inputs
    assert q_ref.shape == dq_ref.shape == (sizes.padded_q, k_ref.shape[1])
    assert k_ref.shape[0] == sizes.padded_kv
    assert call.values or v_ref.shape[0] == sizes.padded_kv
    assert cotangents.lse.shape == cotangents.delta.shape == (sizes.padded_q,)
    block_q, block_kv = sizes.block_q, sizes.block_kv
    row = runs.order[pl.program_id(0)]
    first = first_of_batch(runs, sizes, num_heads)
    index, test = map_and_test(runs, sizes, pl.program_id(1), first)
    rows = pl.ds(row * block_q, block_q)
    q, do = channels.load(q_ref, (rows,), call.values), cotangents.do[rows, :]
    lse, delta = along(cotangents.lse[rows], 0), along(cotangents.delta[rows], 0)
    q_ids = block_ids(row, block_q, 0)
    q_vectors = tuple(along(ref[rows], 0) for ref in vectors.q)

    def add(block: Any, dq: Parts, pairs: jax.Array | None, careful: bool) -> Parts:
        columns = pl.ds(block * block_kv, block_kv)
        k = channels.load(k_ref, (columns,), call.values)
        s = channels.products(q, k) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        here = Here(q_ids, block_ids(block, block_kv, 1), rows, columns)
        added = added_scores(vectors.scores, here, sizes, call)
        v = k[0] if call.values else v_ref[columns, :]
        dp = softmax.dot(do, v, contract=(1, 1))
        factor = dropout_factor(vectors, here, call)
        pairs = not_removed(vectors.scores, added, pairs)
        total = softmax.mask(s if added is None else s + added, pairs)
        slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
        _, ds = softmax.score_gradient(
            total, lse, dp, delta,
            factor=factor, slope=slope, unit=call.unit, careful=careful,
        )  # fmt: skip
        if careful:
            seen = jnp.squeeze(softmax.seen(total, 0), 0)
            k = tuple(rows_kept(x, seen) for x in k)
        return channels.added(dq, ds, k)

    def full(block: Any, dq: Parts) -> Parts:
        return add(block, dq, None, careful=False)

    def partial_(block: Any, dq: Parts, careful: bool = False) -> Parts:
        columns = pl.ds(block * block_kv, block_kv)
        kv_vectors = tuple(along(ref[columns], 1) for ref in vectors.kv)
        tiles = bit_tiles(vectors, sizes, row, block, transposed=False)
        positions = q_ids, block_ids(block, block_kv, 1)
        read = q_vectors, kv_vectors, tiles
        pairs = allowed(call, sizes, test, positions, read)
        return add(block, dq, pairs, careful)

    start = channels.zeros(q)
    row_of_map = index * sizes.num_rows + row
    dq = fold_runs(runs, sizes, row_of_map, full=full, partial=partial_, carry=start)
    careful = partial(partial_, careful=True)
    dq = jax.lax.cond(
        channels.all_finite(dq),
        lambda: dq,
        lambda: fold_runs_tested(runs, sizes, row_of_map, careful, start),
    )
    dq = tuple(x * call.sm_scale for x in dq)
    channels.store(dq_ref, (rows,), dq, call.values)


def dkv_kernel(
    runs: Runs, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    dk_ref: Any, dv_ref: Any, *, sizes: TritonSizes, call: Call, num_heads: int,
) -> None:  # fmt: skip
    """Writes one key block of ``dk`` and ``dv``, summed over the group of query heads.

    If values are channels of ``k``, there is no ``v``, and ``dk`` has the sum of both.

    The refs have one batch entry and key head: ``q [padded_q, group, head_dim]``, ``k,
    dk [padded_kv, head_dim]``, ``v, dv [padded_kv, head_dim_v]``, ``do [padded_q,
    group, head_dim_v]``, f32 ``lse`` and ``delta [group, padded_q]``.

    Tiles are transposed, ``[keys, queries]``. So both products use the gradient of the
    scores without a transpose through shared memory.
    """
    q_ref, k_ref, v_ref = inputs
    assert q_ref.shape[0] == sizes.padded_q
    assert k_ref.shape == dk_ref.shape == (sizes.padded_kv, q_ref.shape[2])
    assert call.values or v_ref.shape == dv_ref.shape
    assert cotangents.do.shape[:2] == q_ref.shape[:2]
    block_q, block_kv = sizes.block_q, sizes.block_kv
    group = q_ref.shape[1]
    row, first_head = runs.order[pl.program_id(0)], pl.program_id(1) * group
    rows = pl.ds(row * block_kv, block_kv)
    k = channels.load(k_ref, (rows,), call.values)
    v = k[0] if call.values else v_ref[rows, :]
    k_ids = block_ids(row, block_kv, 0)
    first = first_of_batch(runs, sizes, num_heads)

    def of_head(member: Any, carry: tuple, *, careful: bool) -> tuple:
        index, test = map_and_test(runs, sizes, first_head + member, first)

        def vector(ref: Any, at: Any, axis: int) -> jax.Array:
            return along(ref[0 if ref.shape[0] == 1 else member, at], axis)

        kv_vectors = tuple(vector(ref, rows, 0) for ref in vectors.kv)

        def add(block: Any, carry: tuple, pairs: jax.Array | None) -> tuple:
            columns = pl.ds(block * block_q, block_q)
            q = channels.load(q_ref, (columns, member), call.values)
            do = cotangents.do[columns, member, :]
            lse = vector(cotangents.lse, columns, 1)
            delta = vector(cotangents.delta, columns, 1)
            s = channels.products(k, q) * call.scale
            s = softmax.cap(s, call.logits_soft_cap, call.unit)
            here = Here(block_ids(block, block_q, 1), k_ids, columns, rows, member)
            added = added_scores(vectors.scores, here, sizes, call)
            dp = softmax.dot(v, do, contract=(1, 1))
            factor = dropout_factor(vectors, here, call)
            pairs = not_removed(vectors.scores, added, pairs)
            total = softmax.mask(s if added is None else s + added, pairs)
            slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
            p, ds = softmax.score_gradient(
                total, lse, dp, delta,
                factor=factor, slope=slope, unit=call.unit, careful=careful,
            )  # fmt: skip
            return channels.added_pairs(carry, (p, ds), (do, q), call.sm_scale)

        def full(block: Any, carry: tuple) -> tuple:
            return add(block, carry, None)

        def partial_(block: Any, carry: tuple) -> tuple:
            columns = pl.ds(block * block_q, block_q)
            q_vectors = tuple(vector(ref, columns, 1) for ref in vectors.q)
            tiles = bit_tiles(
                vectors, sizes, block, row, transposed=True, member=member
            )
            positions = block_ids(block, block_q, 1), k_ids
            read = q_vectors, kv_vectors, tiles
            pairs = allowed(call, sizes, test, positions, read)
            return add(block, carry, pairs)

        row_of_map = index * sizes.num_rows + row
        if careful:
            return fold_runs_tested(runs, sizes, row_of_map, partial_, carry)
        return fold_runs(
            runs, sizes, row_of_map, full=full, partial=partial_, carry=carry
        )

    def of_heads(careful: bool) -> tuple:
        carry = channels.zeros(k), *(() if call.values else channels.zeros((v,)))
        add_head = partial(of_head, careful=careful)
        if group == 1:
            return add_head(jnp.int32(0), carry)
        return repeat(group, add_head, carry)

    found = of_heads(careful=False)
    dk, *dv = jax.lax.cond(
        channels.all_finite((*found[0], *found[1:])),
        lambda: found,
        lambda: of_heads(careful=True),
    )
    if dv:
        dk = tuple(x * call.sm_scale for x in dk)
        dv_ref[rows, :] = dv[0].astype(dv_ref.dtype)
    channels.store(dk_ref, (rows,), dk, call.values)


def backward(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: TritonLists,
    call: Call,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """``dq, dk, dv`` over the blocks of ``lists``; see ``call.Backend.backward``."""
    lse, do, delta = cotangents
    cotangents = Cotangents(softmax.lse_for_backward(lse, call.unit), do, delta)
    dq = _dq(inputs, cotangents, vectors, lists.dq, call)
    dk, dv = _dkv(inputs, cotangents, vectors, lists.dkv, call)
    return dq, dk, dv


def _dq(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    plan: TritonPlan,
    call: Call,
) -> jax.Array:
    batch, num_q_heads, q_seq_len, head_dim = inputs.q.shape
    padded = pad_inputs(inputs, plan.sizes, call.values)
    vectors = pad_vectors(vectors, plan.sizes)
    cotangents = pad_cotangents(cotangents, plan.sizes)

    dq = pl.pallas_call(
        partial(dq_kernel, sizes=plan.sizes, call=call, num_heads=num_q_heads),
        grid=(plan.sizes.num_rows, num_q_heads, batch),
        in_specs=[
            jax.tree.map(everything, plan.runs),
            input_specs(padded),
            jax.tree.map(whole, cotangents),
            vector_specs(vectors),
        ],
        out_specs=whole(padded.q),
        out_shape=shape_like(padded.q.shape, inputs.q.dtype, padded.q),
        compiler_params=compiler_params(call.tiles.dq),
        interpret=call.interpret,
    )(plan.runs, padded, cotangents, vectors)
    return heads_first(dq, q_seq_len, head_dim)


def _dkv(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    plan: TritonPlan,
    call: Call,
) -> tuple[jax.Array, jax.Array | None]:
    batch, num_kv_heads, kv_seq_len, head_dim = inputs.k.shape
    head_dim_v = inputs.v.shape[-1]
    group = inputs.q.shape[1] // num_kv_heads
    padded = pad_inputs(inputs, plan.sizes, call.values)
    vectors = pad_vectors(vectors, plan.sizes)
    cotangents = pad_cotangents(cotangents, plan.sizes)

    def grouped(x: jax.Array) -> Any:
        return whole(x, heads=group)

    given: Any = [None if x is None else whole(x) for x in padded[1:]]
    dk, dv = pl.pallas_call(
        partial(
            dkv_kernel, sizes=plan.sizes, call=call, num_heads=num_kv_heads * group
        ),
        grid=(plan.sizes.num_rows, num_kv_heads, batch),
        in_specs=[
            jax.tree.map(everything, plan.runs),
            Inputs(grouped(padded.q), *given),
            jax.tree.map(grouped, cotangents),
            vector_specs(vectors, group),
        ],
        out_specs=given,
        out_shape=[
            None if x is None else shape_like(x.shape, x.dtype, padded.q)
            for x in padded[1:]
        ],
        compiler_params=compiler_params(call.tiles.dkv),
        interpret=call.interpret,
    )(plan.runs, padded, cotangents, vectors)
    dk = heads_first(dk, kv_seq_len, head_dim)
    return dk, None if dv is None else heads_first(dv, kv_seq_len, head_dim_v)
