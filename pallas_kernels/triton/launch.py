"""How a kernel is launched: what each program sees, padding, compiler options."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import bits, softmax
from pallas_kernels.call import Cotangents, Inputs, PairBits, Seeds, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.triton import scores
from pallas_kernels.triton.runs import TritonSizes
from pallas_kernels.triton.tiles import power_of_two


def whole(
    x: Any, heads: int | None = None, group: int = 1, head_axis: int | None = None
) -> Any:
    """The BlockSpec of a batch row of ``x``, all of it: in Triton just a pointer.

    ``x`` is ``[batch, heads, seq]`` or ``[batch, seq, heads, dim]``, or heads are its
    ``head_axis``; the grid is ``(row, head, batch)``. A program sees one head, without
    the axis, or ``heads`` of them; ``group`` programs in a row see the same. An axis of
    length one is shared by all.
    """
    shape = list(x.shape)
    head_axis = x.ndim - 2 if head_axis is None else head_axis
    shared = [size == 1 for size in shape]
    shape[0], shape[head_axis] = None, heads
    if heads is not None and shared[head_axis]:
        shape[head_axis] = 1

    def at(row: Any, head: Any, batch: Any) -> tuple:
        index = [0] * x.ndim
        if not shared[0]:
            index[0] = batch
        if not shared[head_axis]:
            index[head_axis] = jax.lax.div(head, jnp.int32(group))
        return tuple(index)

    return pl.BlockSpec(tuple(shape), at)


def input_specs(inputs: Inputs) -> Inputs:
    """What the program of one query head sees of the inputs."""
    group = inputs.q.shape[2] // inputs.k.shape[2]
    q, k, v = inputs
    return Inputs(whole(q), whole(k, group=group), whole(v, group=group))


def vector_specs(vectors: Vectors, heads: int | None = None) -> Vectors:
    """What the program of a query head, or of ``heads`` of them, sees of vectors."""
    pair_bits = tuple(
        replace(x, words=whole(x.words, heads, head_axis=1), bit=everything(x.bit))
        for x in vectors.bits
    )
    specs = jax.tree.map(
        lambda x: whole(x, heads, head_axis=1), vectors._replace(bits=())
    )
    return specs._replace(bits=pair_bits)


def everything(x: Any) -> pl.BlockSpec:
    """All of ``x``, for every program."""
    return pl.BlockSpec(x.shape, lambda *program: (0,) * x.ndim)


def pad(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    """``x`` filled up with ``fill`` to ``size`` along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    if size == x.shape[axis]:
        return x
    return jnp.pad(x, widths, constant_values=fill)


def rows_first(x: jax.Array, seq_len: int) -> jax.Array:
    """``[batch, heads, seq, dim]`` turned to ``[batch, seq, heads, dim]``, and padded.

    ``seq`` is filled up to ``seq_len`` and ``dim`` to a power of two. The arrays that
    users have lie this way already: XLA cancels the two transposes, and none is left.
    """
    x = jnp.swapaxes(x, 1, 2)
    return pad(pad(x, 1, seq_len), 3, power_of_two(x.shape[3]))


def heads_first(x: jax.Array, seq_len: int, dim: int) -> jax.Array:
    """The inverse of ``rows_first``."""
    return jnp.swapaxes(x[:, :seq_len, :, :dim], 1, 2)


def pad_inputs(inputs: Inputs, sizes: TritonSizes) -> Inputs:
    """The inputs as the kernels read them."""
    return Inputs(
        rows_first(inputs.q, sizes.padded_q),
        rows_first(inputs.k, sizes.padded_kv),
        rows_first(inputs.v, sizes.padded_kv),
    )


def pad_vectors(vectors: Vectors, sizes: TritonSizes) -> Vectors:
    """Whole blocks; what a predicate makes of the padding is masked or dropped."""

    def q(x: jax.Array) -> jax.Array:
        return pad(x, 2, sizes.padded_q)

    def kv(x: jax.Array) -> jax.Array:
        return pad(x, 2, sizes.padded_kv)

    seeds = vectors.seeds
    return Vectors(
        tuple(map(q, vectors.q)),
        tuple(map(kv, vectors.kv)),
        tuple(_pad_bits(x, sizes) for x in vectors.bits),
        scores.padded(vectors.scores, sizes),
        None if seeds is None else Seeds(q(seeds.q), kv(seeds.kv)),
    )


def _pad_bits(x: PairBits, sizes: TritonSizes) -> PairBits:
    seq_lens = sizes.q_seq_len, sizes.kv_seq_len
    length = bits.padded_length(x, sizes.block_q, *seq_lens)
    bit = jnp.asarray(x.bit, jnp.int32)
    return replace(x, words=pad(x.words, 4, length), bit=pad(bit, 0, sizes.padded_kv))


def pad_cotangents(cotangents: Cotangents, sizes: TritonSizes) -> Cotangents:
    """The cotangents as the kernels read them."""
    # Padded queries have do == 0, delta == 0 and p == 0: they add exactly nothing.
    return Cotangents(
        pad(cotangents.lse, 2, sizes.padded_q, softmax.ABSENT),
        rows_first(cotangents.do, sizes.padded_q),
        pad(cotangents.delta, 2, sizes.padded_q),
    )


def compiler_params(tile: Tile) -> plgpu.CompilerParams:
    """The options of a tile."""
    return plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
