"""The forward kernel: each program computes one query block of one head.

It is the forward pass of FlashAttention-2 (Dao, 2023, algorithm 1) over the key blocks
that the plan lists, as in block-sparse FlashAttention (Dao et al., 2022, section 3.3).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import bits, softmax
from pallas_kernels.call import Call, Inputs, Kept, Vectors
from pallas_kernels.triton import channels
from pallas_kernels.triton.launch import (
    compiler_params,
    everything,
    heads_first,
    input_specs,
    pad_inputs,
    pad_vectors,
    vector_specs,
    whole,
)
from pallas_kernels.triton.runs import (
    Runs,
    TritonLists,
    TritonSizes,
    allowed,
    along,
    bit_tiles,
    block_ids,
    columns_of,
    first_of_batch,
    fold_runs,
    fold_runs_tested,
    map_and_test,
    rows_kept,
)
from pallas_kernels.triton.scores import Here, added_scores, dropout_factor, not_removed
from pallas_kernels.triton.tiles import power_of_two
from pallas_kernels.varying import shape_like


def forward_kernel(
    runs: Runs, inputs: Inputs, vectors: Vectors, pages: Any, o_ref: Any,
    lse_ref: Any, total_ref: Any, *, sizes: TritonSizes, call: Call, num_heads: int,
) -> None:  # fmt: skip
    """Writes one query block of ``o``, ``lse`` and ``total``.

    The refs have one batch entry and head: ``q [padded_q, head_dim]``, ``k [padded_kv,
    head_dim]``, ``v [padded_kv, head_dim_v]`` (None if it is in ``k``), ``o [padded_q,
    head_dim_v]``, and f32 ``lse`` and ``total [padded_q]``. With pages, ``k`` and ``v``
    have the axes ``[pages, page size]`` instead of ``padded_kv``. Each of several parts
    of a row has its own results, ``[parts * padded_q]``.
    """
    q_ref, k_ref, v_ref = inputs
    assert q_ref.shape[0] == sizes.padded_q
    assert o_ref.shape[0] == sizes.parts * sizes.padded_q
    assert sizes.page_size or k_ref.shape == (sizes.padded_kv, q_ref.shape[1])
    assert call.values or v_ref.shape == (*k_ref.shape[:-1], o_ref.shape[1])
    assert lse_ref.shape == total_ref.shape == o_ref.shape[:1]
    block_q, block_kv = sizes.block_q, sizes.block_kv
    part, row = jnp.int32(0), pl.program_id(0)
    if sizes.parts > 1:
        part = jax.lax.rem(row, jnp.int32(sizes.parts))
        row = jax.lax.div(row, jnp.int32(sizes.parts))
    row = runs.order[row]
    first = first_of_batch(runs, sizes, num_heads)
    index, test = map_and_test(runs, sizes, pl.program_id(1), first)
    rows = pl.ds(row * block_q, block_q)
    q = channels.load(q_ref, (rows,), call.values)
    q_ids = block_ids(row, block_q, 0)
    q_vectors = tuple(along(ref[rows], 0) for ref in vectors.q)

    def here(block: Any, columns: Any) -> Here:
        return Here(q_ids, block_ids(block, block_kv, 1), rows, columns)

    def fold(
        block: Any, carry: softmax.Carry, pairs: jax.Array | None, careful: bool
    ) -> softmax.Carry:
        columns = pl.ds(block * block_kv, block_kv)
        keys = columns_of(block, sizes, pages)
        # The scale is applied in f32: rounding a scaled q to bf16 loses accuracy.
        k = channels.load(k_ref, keys, call.values)
        s = channels.products(q, k) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        added = added_scores(vectors.scores, here(block, columns), sizes, call)
        s = s if added is None else s + added
        v = k[0] if call.values else v_ref[*keys, slice(None)]
        s = softmax.mask(s, not_removed(vectors.scores, added, pairs))
        if careful:
            v = rows_kept(v, jnp.squeeze(softmax.seen(s, 0), 0))
        factor = dropout_factor(vectors, here(block, columns), call)
        return softmax.fold(carry, s, v, factor, call.unit)

    def full(block: Any, carry: softmax.Carry) -> softmax.Carry:
        return fold(block, carry, None, careful=False)

    def partial_(
        block: Any, carry: softmax.Carry, careful: bool = False
    ) -> softmax.Carry:
        columns = pl.ds(block * block_kv, block_kv)
        kv_vectors = tuple(along(ref[columns], 1) for ref in vectors.kv)
        tiles = bit_tiles(vectors, sizes, row, block, transposed=False)
        positions = q_ids, block_ids(block, block_kv, 1)
        read = q_vectors, kv_vectors, tiles
        pairs = allowed(call, sizes, test, positions, read)
        return fold(block, carry, pairs, careful)

    start = softmax.start(block_q, o_ref.shape[-1])
    row_of_map = index * sizes.num_rows + row
    carry = fold_runs(
        runs, sizes, row_of_map, full=full, partial=partial_, carry=start, part=part
    )
    careful = partial(partial_, careful=True)
    carry = jax.lax.cond(
        softmax.all_finite(carry.acc),
        lambda: carry,
        lambda: fold_runs_tested(runs, sizes, row_of_map, careful, start, part),
    )
    found = softmax.finish(carry, call.unit)
    rows = pl.ds((part * sizes.num_rows + row) * block_q, block_q)
    o_ref[rows, :] = found.o.astype(o_ref.dtype)
    lse_ref[rows] = jnp.squeeze(found.lse, 1)
    total_ref[rows] = jnp.squeeze(found.total, 1)


def forward(inputs: Inputs, vectors: Vectors, lists: TritonLists, call: Call) -> Kept:
    """Attention over the blocks of ``lists.forward``; see ``call.Backend.forward``."""
    plan, tile = lists.forward, call.tiles.forward
    bits.check(vectors.bits, *((x.sizes.block_q, x.sizes.block_kv) for x in lists))
    batch, num_q_heads, q_seq_len, _ = inputs.q.shape
    head_dim_v = inputs.v.shape[-1]
    padded = pad_inputs(inputs, plan.sizes, call.values)
    vectors = pad_vectors(vectors, plan.sizes)

    o_shape = batch, plan.sizes.padded_q, num_q_heads, power_of_two(head_dim_v)
    o = shape_like(o_shape, inputs.q.dtype, padded.q)
    lse_shape = batch, num_q_heads, plan.sizes.padded_q
    lse = shape_like(lse_shape, jnp.float32, padded.q)
    o, *statistics = pl.pallas_call(
        partial(forward_kernel, sizes=plan.sizes, call=call, num_heads=num_q_heads),
        grid=(plan.sizes.num_rows, num_q_heads, batch),
        in_specs=[
            jax.tree.map(everything, plan.runs),
            input_specs(padded),
            vector_specs(vectors),
            None,
        ],
        out_specs=[whole(o), whole(lse), whole(lse)],
        out_shape=[o, lse, lse],
        compiler_params=compiler_params(tile),
        interpret=call.interpret,
    )(plan.runs, padded, vectors, None)
    lse, total = (x[:, :, :q_seq_len] for x in statistics)
    return Kept(heads_first(o, q_seq_len, head_dim_v), lse, total)
