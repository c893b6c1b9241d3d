"""The forward kernel: each program computes one row of one unit.

It is the forward pass of FlashAttention-2 (Dao, 2023, algorithm 1) over gathered keys.
One program has one row, not several: rows have different lists, so two rows in one
product would multiply each key with both and use half of it.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import softmax
from pallas_kernels.call import Inputs, Kept, Vectors
from pallas_kernels.lists.call import ListCall
from pallas_kernels.lists.triton.launch import (
    GatherSizes,
    arranged_inputs,
    list_spec,
    options,
    sizes_of,
    unit_spec,
    unit_specs,
    vector_specs,
)
from pallas_kernels.lists.triton.rows import (
    chunk_of_list,
    gather_parts,
    own_row,
    scatter,
    scatter_numbers,
)
from pallas_kernels.lists.triton.tiles import ListTile, dims_of, tiles
from pallas_kernels.loops import repeat
from pallas_kernels.triton import channels
from pallas_kernels.triton.launch import heads_first
from pallas_kernels.varying import shape_like


def forward_kernel(
    index_ref: Any, inputs: Inputs, vectors: Vectors, out: tuple[Any, Any, Any],
    *, sizes: GatherSizes, tile: ListTile, call: ListCall,
) -> None:  # fmt: skip
    """Writes the members of one row of ``o``, ``lse`` and ``total``.

    The refs have one batch entry and unit: ``index [listed]``, ``q [q_seq_len, heads,
    head_dim]``, ``k [kv_seq_len, head_dim]``, ``v [kv_seq_len, head_dim_v]`` (None if
    it is in ``k``), ``o [q_seq_len, heads, head_dim_v]``, f32 ``lse`` and ``total
    [q_seq_len, heads]``.
    """
    (q_ref, k_ref, v_ref), (o_ref, *statistics) = inputs, out
    assert index_ref.shape == (sizes.listed,)
    assert q_ref.shape == (sizes.q_seq_len, sizes.heads, k_ref.shape[1])
    assert o_ref.shape == (sizes.q_seq_len, sizes.heads, o_ref.shape[2])
    assert call.values or v_ref.shape[1] == o_ref.shape[2]
    assert all(ref.shape == o_ref.shape[:2] for ref in statistics)
    (query, head, inside), tested = own_row(vectors, sizes, tile)
    q = gather_parts(q_ref, (query, head), inside, call.values)
    chunk = partial(
        chunk_of_list, tested=tested, refs=(index_ref, k_ref, v_ref),
        vectors=vectors, sizes=sizes, tile=tile, call=call,
    )  # fmt: skip

    def fold(step: Any, carry: softmax.Carry) -> softmax.Carry:
        k, v, pairs = chunk(step)
        s = channels.products(q, k) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        return softmax.fold(carry, softmax.mask(s, pairs), v, unit=call.unit)

    start = softmax.start(tile.fixed, o_ref.shape[2])
    steps = tile.steps(sizes.listed * sizes.block_kv)
    found = softmax.finish(repeat(steps, fold, start), call.unit)
    scatter(o_ref, (query, head), inside, found.o)
    for ref, x in zip(statistics, (found.lse, found.total), strict=True):
        scatter_numbers(ref, (query, head), inside, jnp.squeeze(x, 1))


def forward(inputs: Inputs, vectors: Vectors, index: Array, call: ListCall) -> Kept:
    """Attention of each row to the keys of its list."""
    sizes = sizes_of(inputs, index, call)
    given = arranged_inputs(inputs, call.values)
    dims = dims_of(inputs, call.values)
    tile = tiles(sizes.members, sizes.block_kv, dims, inputs.q.dtype).forward
    shape = sizes.batch, sizes.q_seq_len, sizes.q_heads, dims.value
    o = shape_like(shape, inputs.q.dtype, given.q)
    lse = shape_like(shape[:3], jnp.float32, given.q)
    shapes = o, lse, lse
    ((o, *found),) = pl.pallas_call(
        partial(forward_kernel, sizes=sizes, tile=tile, call=call),
        grid=(sizes.rows * tile.parts(sizes.members), sizes.units, sizes.batch),
        in_specs=[
            list_spec(sizes, tile), unit_specs(given, sizes), vector_specs(vectors)
        ],
        out_specs=[tuple(unit_spec(x, sizes) for x in shapes)],
        out_shape=[shapes],
        **options(tile, call, "forward"),
    )(index, given, vectors)  # fmt: skip
    lse, total = (jnp.swapaxes(x, 1, 2) for x in found)
    return Kept(heads_first(o, sizes.q_seq_len, inputs.v.shape[-1]), lse, total)
