"""The values added to the scores of a row of blocks, and their gradient.

A piece is the part of one array that some blocks of a row read. A tile of added values
is computed from pieces, and its gradient is added back to the arrays piece by piece.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import pair_values
from pallas_kernels.call import PairValues, Scores, ScoreValues
from pallas_kernels.loops import repeat
from pallas_kernels.xla.blocks import fold_if_own, from_blocks, to_blocks
from pallas_kernels.xla.heads import HeadGroup


class Pieces(NamedTuple):
    """The arrays of ``ScoreValues`` in blocks, or the pieces that one row reads.

    The first axes ``...`` are batch, key heads and group, each of size 1 if shared.

    - ``q``: array ``[..., q_blocks, block_q]``, piece ``[..., block_q]``.
    - ``kv``: array ``[..., kv_blocks, block_kv]``, piece ``[..., slots, block_kv]``.
    - ``pairs``: array ``[..., q_blocks, block_q, kv_blocks, block_kv]``, piece ``[...,
      block_q, slots, block_kv]``.
    - diagonal ``pairs``: array ``[..., length]`` sorted by ``k - q``, piece ``[...,
      slots, block_q + block_kv]``.
    """

    q: tuple[Array, ...]
    kv: tuple[Array, ...]
    pairs: tuple[Array, ...]


@dataclass(frozen=True)
class Added:
    """The score function of some heads, with the arrays that it reads."""

    scores: Scores
    arrays: Pieces
    diagonal: tuple[bool, ...]  # of each of arrays.pairs
    lengths: tuple[int, int]  # of queries and keys
    block_q: int
    block_kv: int

    @property
    def has_arrays(self) -> bool:
        """Whether there are arrays, any value of which may be ``-inf``."""
        return any(self.arrays)

    def pieces(self, row: Int32[Array, ""], block: Int32[Array, " slots"]) -> Pieces:
        """The pieces that the blocks of a row read."""

        def of_pairs(x: Array, diagonal: bool) -> Array:
            if diagonal:
                size = self.block_q + self.block_kv
                return jax.vmap(
                    lambda at: jax.lax.dynamic_slice_in_dim(x, at, size, 3),
                    out_axes=3,
                )(self._start(row, block))
            return jnp.take(_at(x, row), block, axis=4, mode="clip")

        return Pieces(
            tuple(_at(x, row) for x in self.arrays.q),
            tuple(jnp.take(x, block, axis=3, mode="clip") for x in self.arrays.kv),
            tuple(map(of_pairs, self.arrays.pairs, self.diagonal)),
        )

    def tile(
        self, pieces: Pieces, row: Int32[Array, ""], block: Int32[Array, " slots"]
    ) -> Float[Array, "..."]:
        """The added values in natural units, like ``[b, h, g, q, slots * k]``."""
        along_q = jnp.arange(self.block_q, dtype=jnp.int32)
        along_kv = jnp.arange(self.block_kv, dtype=jnp.int32)
        q_ids = (row * self.block_q + along_q)[:, None]
        k_ids = (block[:, None] * self.block_kv + along_kv[None]).reshape(1, -1)

        def of_pairs(x: Array, diagonal: bool) -> Array:
            if diagonal:
                x = pair_values.toeplitz(x, self.block_q, self.block_kv)
                x = jnp.moveaxis(x, 3, 4)
            return x.reshape(*x.shape[:4], -1)

        lead = (None,) * 3
        return self.scores(
            q_ids[lead],
            k_ids[lead],
            tuple(x[..., None] for x in pieces.q),
            tuple(x.reshape(*x.shape[:3], 1, -1) for x in pieces.kv),
            tuple(map(of_pairs, pieces.pairs, self.diagonal)),
        )

    def add(
        self,
        total: Pieces,
        pieces: Pieces,
        row: Int32[Array, ""],
        block: Int32[Array, " slots"],
    ) -> Pieces:
        """Adds ``pieces`` to ``total`` where they were read, one block at a time."""

        def q(x: Array, piece: Array) -> Array:
            new = _at(x, row) + piece
            return jax.lax.dynamic_update_index_in_dim(x, new, row, 3)

        def kv(x: Array, piece: Array) -> Array:
            def one(i: Any, x: Array) -> Array:
                new = jax.lax.dynamic_index_in_dim(piece, i, 3, keepdims=False)
                old = jax.lax.dynamic_index_in_dim(x, block[i], 3, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(x, old + new, block[i], 3)

            return _each(one, x, block)

        def diagonal(x: Array, piece: Array) -> Array:
            start, size = self._start(row, block), self.block_q + self.block_kv

            def one(i: Any, x: Array) -> Array:
                new = jax.lax.dynamic_index_in_dim(piece, i, 3, keepdims=False)
                old = jax.lax.dynamic_slice_in_dim(x, start[i], size, 3)
                return jax.lax.dynamic_update_slice_in_dim(x, old + new, start[i], 3)

            return _each(one, x, block)

        def dense(x: Array, piece: Array) -> Array:
            old = _at(x, row)

            def one(i: Any, old: Array) -> Array:
                new = jax.lax.dynamic_index_in_dim(piece, i, 4, keepdims=False)
                here = jax.lax.dynamic_index_in_dim(old, block[i], 4, keepdims=False)
                there = here + new
                return jax.lax.dynamic_update_index_in_dim(old, there, block[i], 4)

            return jax.lax.dynamic_update_index_in_dim(
                x, _each(one, old, block), row, 3
            )

        pairs = zip(total.pairs, pieces.pairs, self.diagonal, strict=True)
        return Pieces(
            tuple(map(q, total.q, pieces.q)),
            tuple(map(kv, total.kv, pieces.kv)),
            tuple((diagonal if d else dense)(x, piece) for x, piece, d in pairs),
        )

    def restored(self, total: Pieces) -> ScoreValues:
        """Undoes the blocks of ``total``; the heads stay as key heads and group."""
        q_len, kv_len = self.lengths

        def of_pairs(x: Array, diagonal: bool) -> PairValues:
            if not diagonal:
                x = from_blocks(from_blocks(x, 5, kv_len), 3, q_len)
                return PairValues(x)
            before = -q_len % self.block_q
            x = jax.lax.slice_in_dim(x, before, before + q_len + kv_len - 1, axis=3)
            return PairValues(jnp.flip(x, axis=3), diagonal=True)

        return ScoreValues(
            tuple(from_blocks(x, 3, q_len) for x in total.q),
            tuple(from_blocks(x, 3, kv_len) for x in total.kv),
            tuple(map(of_pairs, total.pairs, self.diagonal)),
        )

    def _start(
        self, row: Int32[Array, ""], block: Int32[Array, " slots"]
    ) -> Int32[Array, " slots"]:
        last = -(-self.lengths[0] // self.block_q) - 1
        return (last - row) * self.block_q + block * self.block_kv


def added(
    scores: Scores,
    values: ScoreValues,
    heads: HeadGroup,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
) -> Added:
    """The score function and its arrays for some heads, in blocks."""
    block_q, block_kv = blocks

    def of_pairs(x: PairValues) -> Array:
        if x.diagonal:
            found = pair_values.strip(x, *lengths, block_q=block_q, block_kv=block_kv)
            return fold_if_own(found, heads)
        found = to_blocks(fold_if_own(x.values, heads), 3, block_q)
        return to_blocks(found, 5, block_kv)

    arrays = Pieces(
        tuple(to_blocks(fold_if_own(x, heads), 3, block_q) for x in values.q),
        tuple(to_blocks(fold_if_own(x, heads), 3, block_kv) for x in values.kv),
        tuple(map(of_pairs, values.pairs)),
    )
    diagonal = tuple(x.diagonal for x in values.pairs)
    return Added(scores, arrays, diagonal, lengths, block_q, block_kv)


def _at(x: Array, row: Int32[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(x, row, 3, keepdims=False)


def _each(one: Callable, x: Array, block: Int32[Array, " slots"]) -> Array:
    return repeat(len(block), one, x)
