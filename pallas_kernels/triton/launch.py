"""Block specs, padding and compiler options of the Triton kernels."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import bits, softmax
from pallas_kernels.call import Cotangents, Inputs, PairBits, Seeds, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.shared_values import Values
from pallas_kernels.triton import scores
from pallas_kernels.triton.channels import padded_dim
from pallas_kernels.triton.runs import TritonSizes


def whole(
    x: Any, heads: int | None = None, group: int = 1, head_axis: int | None = None
) -> Any:
    """The BlockSpec of ``x`` for one batch entry; in Triton it is only a pointer.

    ``x`` is ``[batch, heads, seq]`` or ``[batch, seq, heads, dim]``; otherwise
    ``head_axis`` is its axis of heads. The grid is ``(row, head, batch)``. A program
    sees one head, without the axis, or ``heads`` of them. ``group`` successive programs
    see the same head. All programs share an axis of size 1.
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
    """The block specs of ``q, k, v`` for a program per query head."""
    group = inputs.q.shape[2] // inputs.k.shape[2]
    q, k, v = inputs
    value: Any = None if v is None else whole(v, group=group)
    return Inputs(whole(q), whole(k, group=group), value)


def vector_specs(vectors: Vectors, heads: int | None = None) -> Vectors:
    """The block specs of vectors for a program per query head, or per ``heads``."""
    pair_bits = tuple(
        replace(x, words=whole(x.words, heads, head_axis=1), bit=everything(x.bit))
        for x in vectors.bits
    )
    specs = jax.tree.map(
        lambda x: whole(x, heads, head_axis=1), vectors._replace(bits=())
    )
    return specs._replace(bits=pair_bits)


def everything(x: Any) -> pl.BlockSpec:
    """The BlockSpec with which every program sees all of ``x``."""
    return pl.BlockSpec(x.shape, lambda *program: (0,) * x.ndim)


def pad(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    """``x`` padded with ``fill`` to ``size`` along ``axis``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    if size == x.shape[axis]:
        return x
    return jnp.pad(x, widths, constant_values=fill)


def rows_first(x: jax.Array, seq_len: int, values: Values | None = None) -> jax.Array:
    """``[batch, heads, seq, dim]`` as ``[batch, seq, heads, dim]``, padded.

    ``seq`` is padded to ``seq_len`` and ``dim`` to ``padded_dim``. Users pass arrays in
    this layout, so XLA cancels this transpose with the one before the call.
    """
    x = jnp.swapaxes(x, 1, 2)
    return pad(pad(x, 1, seq_len), 3, padded_dim(x.shape[3], values))


def heads_first(x: jax.Array, seq_len: int, dim: int) -> jax.Array:
    """The inverse of ``rows_first``."""
    return jnp.swapaxes(x[:, :seq_len, :, :dim], 1, 2)


def pad_inputs(
    inputs: Inputs, sizes: TritonSizes, values: Values | None = None
) -> Inputs:
    """The inputs in the layout that the kernels read (``rows_first``).

    There is no ``v`` if the ``values`` are channels of the keys.
    """
    v: Any = None if values else rows_first(inputs.v, sizes.padded_kv)
    return Inputs(
        rows_first(inputs.q, sizes.padded_q, values),
        rows_first(inputs.k, sizes.padded_kv, values),
        v,
    )


def pad_vectors(vectors: Vectors, sizes: TritonSizes) -> Vectors:
    """The vectors padded to whole blocks.

    The value of the padding does not matter: its pairs are masked or dropped.
    """

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
    """The cotangents padded to whole blocks, ``do`` in the layout of ``rows_first``."""
    # Padded queries have do == 0, delta == 0 and p == 0: they add exactly 0.
    return Cotangents(
        pad(cotangents.lse, 2, sizes.padded_q, softmax.ABSENT),
        rows_first(cotangents.do, sizes.padded_q),
        pad(cotangents.delta, 2, sizes.padded_q),
    )


def compiler_params(tile: Tile) -> plgpu.CompilerParams:
    """The compiler options of a tile."""
    return plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
