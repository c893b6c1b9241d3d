"""The kernels of dk and dv: walks over the rows that list some keys, and their sums."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import softmax
from pallas_kernels.call import Cotangents, Inputs, Vectors
from pallas_kernels.lists.call import ListCall
from pallas_kernels.lists.triton.launch import GatherSizes, options, vector_specs
from pallas_kernels.lists.triton.rows import (
    gather,
    gather_parts,
    iota,
    members_of,
    numbers,
    scatter_parts,
)
from pallas_kernels.lists.triton.tiles import ListTile
from pallas_kernels.lists.triton.transposed import (
    TransposedLists,
    spans_of,
    specs_of,
    transposed,
)
from pallas_kernels.triton import channels
from pallas_kernels.triton.launch import whole
from pallas_kernels.triton.runs import along
from pallas_kernels.varying import shape_like


def stretch_kernel(
    lists: TransposedLists, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    out: tuple[Any, ...], *, sizes: GatherSizes, tile: ListTile, call: ListCall,
) -> None:  # fmt: skip
    """Writes what the pairs of one stretch add to ``dk`` and ``dv`` of some keys.

    The refs have one batch entry and key head: ``q [q_seq_len, group, head_dim]``, ``k
    [kv_seq_len, head_dim]``, ``v [kv_seq_len, head_dim_v]``, ``do [q_seq_len, group,
    head_dim_v]``, f32 ``lse`` and ``delta [q_seq_len, group]``, f32 ``dk [keys,
    head_dim]`` and ``dv [keys, head_dim_v]``.

    If values are channels of ``k``, there are no ``v`` and ``dv``, and ``dk`` has the
    sum of both. Tiles are transposed, ``[keys, members]``, as in
    ``pallas_kernels.triton``.
    """
    q_ref, k_ref, v_ref = inputs
    for ref, of in zip(out, (k_ref, v_ref), strict=False):
        assert ref.shape == (tile.fixed, of.shape[1])
    assert cotangents.do.shape[:2] == q_ref.shape[:2]
    assert cotangents.lse.shape == cotangents.delta.shape == q_ref.shape[:2]
    stretch, part = number_and_part(sizes, tile)
    span, first = lists.span[stretch], lists.first[stretch]
    own_block, key, own = own_keys(span, part, sizes, tile)
    k = gather_parts(k_ref, (key,), own, call.values)
    v = k[0] if call.values else gather(v_ref, (key,), own)
    kv_vectors = tuple(along(numbers(ref, (key,), own), 0) for ref in vectors.kv)
    members, rows = jnp.int32(sizes.members), jnp.int32(sizes.rows)
    stop = (lists.last[stretch] - first) * members

    def add(step: Any, carry: tuple) -> tuple:
        place = step * tile.gathered + iota(tile.gathered)
        there, pair = place < stop, (first + jax.lax.div(place, members),)
        row = numbers(lists.row, pair, there)
        block = numbers(lists.block, pair, there, -1)
        member = jax.lax.rem(place, members)
        query, head, inside = members_of(jax.lax.rem(row, rows), member, sizes)
        inside = inside & there
        at = query, jax.lax.div(row, rows) * sizes.heads + head
        q = gather_parts(q_ref, at, inside, call.values)
        do = gather(cotangents.do, at, inside)
        lse = along(numbers(cotangents.lse, at, inside, softmax.ABSENT), 1)
        delta = along(numbers(cotangents.delta, at, inside), 1)
        read = (numbers(ref, (query,), inside) for ref in vectors.q)
        q_vectors = tuple(along(x, 1) for x in read)
        tested = along(query, 1), along(key, 0), q_vectors, kv_vectors
        pairs = call.predicate(0, *tested, ()) & along(inside, 1) & along(own, 0)
        pairs = pairs & (along(own_block, 0) == along(block, 1))
        s = channels.products(k, q) * call.scale
        s = softmax.cap(s, call.logits_soft_cap, call.unit)
        dp = softmax.dot(v, do, contract=(1, 1))
        slope = softmax.cap_slope(s, call.logits_soft_cap, call.unit)
        # Careful: a key that nobody sees may hold NaN, and its gradient is 0.
        p, ds = softmax.score_gradient(
            softmax.mask(s, pairs), lse, dp, delta,
            slope=slope, unit=call.unit, careful=True,
        )  # fmt: skip
        return channels.added_pairs(carry, (p, ds), (do, q), call.sm_scale)

    steps = jax.lax.div(stop + (tile.gathered - 1), jnp.int32(tile.gathered))
    carry = channels.zeros(k), *(() if call.values else channels.zeros((v,)))
    dk, *dv = jax.lax.fori_loop(jnp.int32(0), steps, add, carry)
    if dv:
        dk, out[1][...] = tuple(x * call.sm_scale for x in dk), dv[0]
    channels.store(out[0], (slice(None),), dk, call.values)


def number_and_part(sizes: GatherSizes, tile: ListTile) -> tuple[Any, Any]:
    """The stretch or span of this program, and which part of its keys."""
    parts = jnp.int32(tile.parts(spans_of(sizes).keys))
    program = pl.program_id(0)
    return jax.lax.div(program, parts), jax.lax.rem(program, parts)


def own_keys(
    span: Any, part: Any, sizes: GatherSizes, tile: ListTile
) -> tuple[Any, Any, Any]:
    """The blocks and positions of a program's keys, int32, and whether they exist."""
    spans, place = spans_of(sizes), part * tile.fixed + iota(tile.fixed)
    block = span * spans.blocks + jax.lax.div(place, jnp.int32(sizes.block_kv))
    key = span * spans.keys + place
    return block, key, (place < spans.keys) & (key < sizes.kv_seq_len)


def sum_kernel(
    stretch_ref: Any, parts: tuple[Any, ...], out: tuple[Any, ...],
    *, sizes: GatherSizes, tile: ListTile, call: ListCall,
) -> None:  # fmt: skip
    """Writes some keys of ``dk`` and ``dv``, the sums over the stretches of a span.

    The refs have one batch entry and key head: f32 ``parts [stretches, parts, keys,
    dim]`` of ``dk`` and of ``dv``, and ``dk`` and ``dv [kv_seq_len, dim]``.
    """
    span, part = number_and_part(sizes, tile)
    _, key, own = own_keys(span, part, sizes, tile)
    first, last = stretch_ref[span], stretch_ref[span + 1]
    for ref, of_stretches in zip(out, parts, strict=True):
        assert ref.shape == (sizes.kv_seq_len, of_stretches.shape[3])

        # Without values among its channels, dk is one part, as dv is.
        def add(i: Any, total: Any, of_stretches: Any = of_stretches) -> Any:
            new = channels.load(of_stretches, (i, part, slice(None)), call.values)
            return tuple(x + y for x, y in zip(total, new, strict=True))

        start = tuple(
            jnp.zeros((tile.fixed, size), jnp.float32)
            for _, size in channels.parts_of(ref.shape[-1], call.values)
        )
        total = jax.lax.fori_loop(first, last, add, start)
        scatter_parts(ref, (key,), own, total, call.values)


def backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, index: Array,
    sizes: GatherSizes, tile: ListTile, call: ListCall,
) -> tuple[Array, ...]:  # fmt: skip
    """``dk, dv``, arranged as all arguments are; ``dk`` alone if ``v`` is None."""
    spans = spans_of(sizes)
    lists = transposed(index, sizes, spans)
    q, *keys = (x for x in inputs if x is not None)
    parts, group = tile.parts(spans.keys), sizes.q_heads // sizes.kv_heads

    def of_stretches(x: Array) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        shape = *lead, spans.stretches, parts, tile.fixed, x.shape[-1]

        def at(program: Any, head: Any, batch: Any) -> tuple:
            count = jnp.int32(parts)
            stretch = jax.lax.div(program, count)
            return batch, head, stretch, jax.lax.rem(program, count), 0, 0

        spec = pl.BlockSpec((None, None, None, None, *shape[4:]), at)
        return spec, shape_like(shape, jnp.float32, q)

    lead = sizes.batch, sizes.kv_heads
    given: Any = jax.tree.map(whole, inputs)._replace(q=whole(q, group))
    specs, shapes = zip(*map(of_stretches, keys), strict=True)
    (found,) = pl.pallas_call(
        partial(stretch_kernel, sizes=sizes, tile=tile, call=call),
        grid=(spans.stretches * parts, sizes.kv_heads, sizes.batch),
        in_specs=[
            specs_of(lists, sizes),
            given,
            jax.tree.map(partial(whole, heads=group, head_axis=2), cotangents),
            vector_specs(vectors),
        ],
        out_specs=[specs],
        out_shape=[shapes],
        **options(tile, call, "backward_kv"),
    )(lists, inputs, cotangents, vectors)
    (found,) = pl.pallas_call(
        partial(sum_kernel, sizes=sizes, tile=tile, call=call),
        grid=(spans.count * parts, sizes.kv_heads, sizes.batch),
        in_specs=[
            specs_of(lists, sizes).stretch,
            tuple(whole(x, head_axis=1) for x in found),
        ],
        out_specs=[tuple(map(whole, keys))],
        out_shape=[tuple(shape_like(x.shape, x.dtype, q) for x in keys)],
        **options(tile, call, "backward_kv_sum"),
    )(lists.stretch, tuple(found))
    return found
