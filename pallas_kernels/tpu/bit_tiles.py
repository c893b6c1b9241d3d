"""Reads packed bits of pairs inside a TPU kernel.

Everything is done on words, which are few: 8 registers for a tile of 512 x 512. Only
``unpacked`` works on the whole tile, by an ``and`` and a comparison.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_mask import Axis
from pallas_kernels.call import WORD, PairBits
from pallas_kernels.tpu import bit_words
from pallas_kernels.tpu.bit_words import RowBits
from pallas_kernels.tpu.runs import LANES


class BitForm(NamedTuple):
    """The static part of ``PairBits``, with the number of words of a plane."""

    words: int
    block_kv: int
    blocks_per_plane: int
    keys_per_bit: int | None

    @property
    def spreads(self) -> bool:
        """Whether ``words_of_keys`` can read the words."""
        per = self.keys_per_bit
        if per is None or per & (per - 1):
            return False
        # One word holds all blocks of a plane, or a plane is one block.
        return self.blocks_per_plane == 1 or (
            self.words == 1 and self.block_kv % WORD == 0
        )


def form_of(x: PairBits) -> BitForm:
    """The ``BitForm`` of pair bits."""
    return BitForm(x.words.shape[3], x.block_kv, x.blocks_per_plane, x.keys_per_bit)


def key_numbers(x: PairBits, by: Axis) -> jax.Array | None:
    """A number of each key that a kernel with rows ``by`` reads; None if it needs none.

    It is the lane of the key's group in a window, or the number of the key's bit.
    """
    if by == "q":
        return bit_words.lanes_of_keys(x)
    return None if form_of(x).spreads else x.bit


def words_of_keys(words: jax.Array, block: Any, form: BitForm) -> jax.Array:
    """The words ``[words, columns]`` of groups as words of keys, ``in_order``.

    ``block`` is the key block. ``form.spreads`` must hold.
    """
    per, count = form.keys_per_bit, -(-form.block_kv // WORD)
    assert form.spreads
    assert per is not None
    columns = words.shape[1]
    if per == 1 and form.words == count:
        return words
    if form.words == 1:
        source = jnp.broadcast_to(words, (count, columns))
    else:
        repeated = [
            jnp.broadcast_to(words[i : i + 1], (per, columns))
            for i in range(form.words)
        ]
        # A block that ends after the last key may have fewer words.
        short = max(0, count - per * form.words)
        missing = [jnp.zeros((short, columns), jnp.int32)] if short else []
        source = jnp.concatenate(repeated + missing, axis=0)[:count]
    # The number of the first bit of each word of keys.
    key = lax.broadcasted_iota(jnp.int32, (count, 1), 0) * WORD
    if form.blocks_per_plane > 1:
        in_plane = lax.rem(block, jnp.int32(form.blocks_per_plane))
        key = key + in_plane * form.block_kv
    first = lax.shift_right_logical(key, _like(key, per.bit_length() - 1))
    shift = jnp.broadcast_to(first & (WORD - 1), source.shape)
    return _spread(lax.shift_right_logical(source, shift), min(per, WORD))


def _spread(words: jax.Array, times: int) -> jax.Array:
    """Repeats each of the lowest ``32 / times`` bits ``times`` times.

    Each step moves the upper half of every group of bits, until a group is one bit.
    """
    if times == 1:
        return words
    size = WORD // times
    words = words & ((1 << size) - 1)
    while size > 1:
        size //= 2
        places = range(0, WORD, size * times)
        kept = sum(((1 << size) - 1) << place for place in places)
        words = words | lax.shift_left(words, _like(words, size * (times - 1)))
        words = words & _signed(kept)
    width = 1
    while width < times:
        words = words | lax.shift_left(words, _like(words, width))
        width *= 2
    return words


def on_lanes(words: jax.Array, lanes: jax.Array) -> jax.Array:
    """The columns ``lanes [1, n]`` of ``words``, which have whole registers."""
    count, size = words.shape[0], lanes.shape[1]

    def columns(start: int) -> jax.Array:
        lane = lanes[:, start : min(start + LANES, size)]
        lane = jnp.broadcast_to(lane, (count, lane.shape[1]))
        found = None
        # The chip gathers within a register.
        for first in range(0, words.shape[1], LANES):
            here = jnp.take_along_axis(
                words[:, first : first + LANES],
                lane & (LANES - 1),
                axis=1,
                mode="promise_in_bounds",
            )
            found = here if found is None else jnp.where(lane >= first, here, found)
        assert found is not None
        return found

    return jnp.concatenate([columns(i) for i in range(0, size, LANES)], axis=1)


def unpacked(words: jax.Array, rows: RowBits) -> jax.Array:
    """The bool tile ``[rows, columns]`` of its words."""
    columns = words.shape[1]
    parts = []
    for piece in range(rows.pieces):
        own = words[piece * rows.step : (piece + 1) * rows.step]
        if rows.step == 1:
            bit = lax.broadcasted_iota(jnp.int32, (rows.bits, 1), 0)
            parts.append(own & lax.shift_left(jnp.ones_like(bit), bit))
        else:
            parts += [own & _signed(1 << i) for i in range(rows.bits)]
    tile = jnp.concatenate(parts, axis=0)[: rows.rows]
    assert tile.shape == (rows.rows, columns)
    return tile != 0


def from_row(first: jax.Array, rows: RowBits) -> jax.Array:
    """Words of the rows from ``first [1, columns]`` on, which is in ``0 .. rows``."""
    word = lax.broadcasted_iota(jnp.int32, (rows.words, 1), 0)
    log = rows.step.bit_length() - 1
    piece = lax.shift_right_logical(word, _like(word, log))
    row = piece * (rows.bits * rows.step) + (word & (rows.step - 1))
    ahead = first - row + (rows.step - 1)
    bit = lax.shift_right_arithmetic(ahead, _like(ahead, log))
    ones = lax.shift_left(_like(bit, -1), jnp.clip(bit, 0, WORD - 1))
    return jnp.where(bit < WORD, ones, 0)


def _like(x: jax.Array, value: int) -> jax.Array:
    return jnp.full(x.shape, value, jnp.int32)


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned word."""
    return word - (1 << WORD) if word >> (WORD - 1) else word
