"""Unpacks ``PairBits`` into bool tiles, the same way on every backend.

A partial tile reads one or a few int32 words for each query and one int32 bit number
for each key. Entry ``(q, k)`` of the tile is bit ``bit[k]`` of the words of ``q``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.call import WORD, PairBits


def tile(words: Sequence[jax.Array], bit: jax.Array) -> jax.Array:
    """The bool tile of the ``words`` of its queries and the ``bit`` of its keys.

    Words are int32 ``[q, 1]`` with bits ``[1, k]`` (the tile is ``[q, k]``), or words
    ``[1, q]`` with bits ``[k, 1]`` (the tile is ``[k, q]``).
    """
    # The shift is done on the keys, not on the tile: a word then costs one `and` and
    # one `or` per pair, and no bool is broadcast, which is slow on TPUs.
    mask = lax.shift_left(jnp.ones_like(bit), bit & (WORD - 1))
    if len(words) == 1:
        return (words[0] & mask) != 0
    holder = lax.shift_right_logical(bit, jnp.full_like(bit, WORD.bit_length() - 1))
    chosen = [word & jnp.where(holder == w, mask, 0) for w, word in enumerate(words)]
    return reduce(jnp.bitwise_or, chosen) != 0


def window(
    x: PairBits, q_block: Any, kv_block: Any, *, block_q: int, kv_seq_len: int
) -> tuple[Any, Any]:
    """The plane of a tile, and the index of the first of its ``words_of_block``.

    ``kv_block`` counts blocks of ``x.block_kv``. The index is a multiple of their
    number; if ``x`` is diagonal, of the greatest common divisor of both blocks.
    """
    if not x.diagonal:
        plane = quotient(kv_block, x.blocks_per_plane)
        if x.queries_per_word > block_q:
            return plane, quotient(q_block, x.queries_per_word // block_q)
        return plane, q_block * words_of_block(x, block_q)
    last = -(-kv_seq_len // x.block_kv) - 1
    return 0, q_block * block_q + (last - kv_block) * x.block_kv


def words_of_block(x: PairBits, block_q: int) -> int:
    """The number of words, for one key, that the queries of a block read."""
    return max(1, block_q // x.queries_per_word)


def expanded(x: PairBits, q_seq_len: int) -> PairBits:
    """The same bits with a word for each query."""
    words = jnp.repeat(x.words, x.queries_per_word, axis=-1)[..., :q_seq_len]
    return replace(x, words=words, queries_per_word=1)


def quotient(number: Any, by: int) -> Any:
    """``number // by`` of an int or an int32 array that is not negative."""
    if isinstance(number, int):
        return number // by
    # On traced ints, // lowers to a sign, and that asks which TPU it is for.
    if by & (by - 1) == 0:
        shift = jnp.full_like(number, by.bit_length() - 1)
        return lax.shift_right_logical(number, shift)
    return lax.div(number, jnp.full_like(number, by))


def padded_length(x: PairBits, block_q: int, q_seq_len: int, kv_seq_len: int) -> int:
    """The length of the words at which every window of whole blocks lies in them."""
    padded_q = -(-q_seq_len // block_q) * block_q
    if not x.diagonal:
        return -(-padded_q // x.queries_per_word)
    return padded_q + (-(-kv_seq_len // x.block_kv) - 1) * x.block_kv


def check(bits: Iterable[PairBits], *blocks: tuple[int, int]) -> None:
    """Checks that bits are packed for the blocks that the kernels visit.

    ``blocks`` are ``(block_q, block_kv)`` of each kernel.

    Raises:
      ValueError: a kernel has another ``block_kv`` than the bits, or a ``block_q`` of
        which only a part shares a word.
    """
    blocks_q, blocks_kv = zip(*blocks, strict=True)
    for i, x in enumerate(bits):
        per = x.queries_per_word
        if any(per % block and block % per for block in blocks_q):
            raise ValueError(
                f"bits[{i}] have a word for each {per} queries, and the kernels have "
                f"block_q={', '.join(map(str, blocks_q))}: queries_per_word must "
                "divide each block_q or be a multiple of it; pack the bits again"
            )
        if any(block != x.block_kv for block in blocks_kv):
            raise ValueError(
                f"bits[{i}] are packed for block_kv={x.block_kv}, and the kernels have "
                f"block_kv={', '.join(map(str, blocks_kv))}: all kernels of a call "
                "with bits must have the block_kv of the bits; give all masks this "
                "block_kv, or pack the bits again"
            )
