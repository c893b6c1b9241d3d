"""Bits of pairs as tiles: what every backend makes of ``PairBits``.

A partial tile has a word or a few for each query and a bit number for each key; the
tile is their outer product. All of it is int32 of the rank of the ids.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.call import WORD, PairBits


def tile(words: Sequence[jax.Array], bit: jax.Array) -> jax.Array:
    """The bool tile of ``words``, int32 along the queries, and ``bit`` along the keys.

    Columns ``[q, 1]`` with a row ``[1, k]``, or rows ``[1, q]`` with a column
    ``[k, 1]``: the tile is ``[q, k]`` or ``[k, q]``.
    """
    # Masks of the keys, not shifts of the tile: a word costs the tile an `and` and an
    # `or`, and no bool is broadcast, which TPUs do badly.
    mask = lax.shift_left(jnp.ones_like(bit), bit & (WORD - 1))
    if len(words) == 1:
        return (words[0] & mask) != 0
    holder = lax.shift_right_logical(bit, jnp.full_like(bit, WORD.bit_length() - 1))
    chosen = [word & jnp.where(holder == w, mask, 0) for w, word in enumerate(words)]
    return reduce(jnp.bitwise_or, chosen) != 0


def window(
    x: PairBits, q_block: Any, kv_block: Any, *, block_q: int, kv_seq_len: int
) -> tuple[Any, Any]:
    """The plane of a tile, and where the ``block_q`` words of its queries start.

    ``kv_block`` counts blocks of ``x.block_kv``. A start is a multiple of ``block_q``,
    or of the greatest common divisor of the two blocks where ``x`` is diagonal.
    """
    if not x.diagonal:
        return _quotient(kv_block, x.blocks_per_plane), q_block * block_q
    last = -(-kv_seq_len // x.block_kv) - 1
    return 0, q_block * block_q + (last - kv_block) * x.block_kv


def _quotient(block: Any, by: int) -> Any:
    """``block // by``, spelt without asking for the chip that it is traced for."""
    if by == 1 or isinstance(block, int):
        return block // by
    return lax.div(block, jnp.full_like(block, by))


def padded_length(x: PairBits, block_q: int, q_seq_len: int, kv_seq_len: int) -> int:
    """How long the words must be for every window of whole blocks to lie in them."""
    padded_q = -(-q_seq_len // block_q) * block_q
    if not x.diagonal:
        return padded_q
    return padded_q + (-(-kv_seq_len // x.block_kv) - 1) * x.block_kv


def check(bits: Iterable[PairBits], *blocks_kv: int) -> None:
    """Refuses bits that are packed for other key blocks than the kernels visit."""
    for i, x in enumerate(bits):
        if any(block != x.block_kv for block in blocks_kv):
            raise ValueError(
                f"bits[{i}] are packed for block_kv={x.block_kv}, and the kernels have "
                f"block_kv={', '.join(map(str, blocks_kv))}: all kernels of a call "
                "with bits take one block_kv, that of the bits; plan them alike, or "
                "pack the bits anew"
            )
