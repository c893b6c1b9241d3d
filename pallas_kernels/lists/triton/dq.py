"""The kernel of dq: each program computes one row of one unit, as the forward kernel.

The weights are computed again from the lse (Dao, 2023, algorithm 2).
"""

from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import softmax
from pallas_kernels.call import Cotangents, Inputs, Vectors
from pallas_kernels.lists.call import ListCall
from pallas_kernels.lists.triton.launch import (
    GatherSizes,
    list_spec,
    options,
    unit_spec,
    unit_specs,
    vector_specs,
)
from pallas_kernels.lists.triton.rows import (
    chunk_of_list,
    gather,
    gather_parts,
    numbers,
    own_row,
    scatter_parts,
)
from pallas_kernels.lists.triton.tiles import ListTile
from pallas_kernels.loops import repeat
from pallas_kernels.triton import channels
from pallas_kernels.triton.runs import along
from pallas_kernels.varying import shape_like


def dq_kernel(
    index_ref: Any, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    dq_ref: Any, *, sizes: GatherSizes, tile: ListTile, call: ListCall,
) -> None:  # fmt: skip
    """Writes the members of one row of ``dq``.

    The refs have one batch entry and unit: ``index [listed]``, ``q, dq [q_seq_len,
    heads, head_dim]``, ``k [kv_seq_len, head_dim]``, ``v [kv_seq_len, head_dim_v]``,
    ``do [q_seq_len, heads, head_dim_v]``, f32 ``lse`` and ``delta [q_seq_len, heads]``.
    """
    q_ref, k_ref, v_ref = inputs
    assert index_ref.shape == (sizes.listed,)
    assert q_ref.shape == dq_ref.shape
    assert cotangents.do.shape[:2] == q_ref.shape[:2]
    assert cotangents.lse.shape == cotangents.delta.shape
    (query, head, inside), tested = own_row(vectors, sizes, tile)
    place = query, head
    q = gather_parts(q_ref, place, inside, call.values)
    do = gather(cotangents.do, place, inside)
    lse = along(numbers(cotangents.lse, place, inside, softmax.ABSENT), 0)
    delta = along(numbers(cotangents.delta, place, inside), 0)
    chunk = partial(
        chunk_of_list, tested=tested, refs=(index_ref, k_ref, v_ref),
        vectors=vectors, sizes=sizes, tile=tile, call=call,
    )  # fmt: skip

    def add(step: Any, dq: Any) -> Any:
        k, v, pairs = chunk(step)
        s = channels.products(q, k) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        dp = softmax.dot(do, v, contract=(1, 1))
        slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
        _, ds = softmax.score_gradient(
            softmax.mask(s, pairs), lse, dp, delta, slope=slope, unit=call.unit
        )
        return channels.added(dq, ds, k)

    steps = tile.steps(sizes.listed * sizes.block_kv)
    dq = repeat(steps, add, channels.zeros(q))
    dq = tuple(x * call.sm_scale for x in dq)
    scatter_parts(dq_ref, place, inside, dq, call.values)


def backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, index: Array,
    sizes: GatherSizes, tile: ListTile, call: ListCall,
) -> Array:  # fmt: skip
    """``dq``, arranged as all arguments are."""
    specs = unit_specs(inputs, sizes)
    return pl.pallas_call(
        partial(dq_kernel, sizes=sizes, tile=tile, call=call),
        grid=(sizes.rows * tile.parts(sizes.members), sizes.units, sizes.batch),
        in_specs=[
            list_spec(sizes, tile),
            specs,
            jax.tree.map(partial(unit_spec, sizes=sizes), cotangents),
            vector_specs(vectors),
        ],
        out_specs=specs.q,
        out_shape=shape_like(inputs.q.shape, inputs.q.dtype, inputs.q),
        **options(tile, call, "backward_q"),
    )(index, inputs, cotangents, vectors)
