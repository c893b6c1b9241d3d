"""Packs the bits of pairs (``PairBits``) for TPUs, where moving lanes is slow.

A register holds 8 rows (sublanes) and 128 columns (lanes) of a tile. A kernel reads
words whose bits are rows of its tile, so that it unpacks them in place: ``RowBits``.

- Tiles ``[keys, queries]`` (dk and dv) read ``PairBits.words`` as they are. A word
  holds keys of one query, and queries lie along the lanes.
- Tiles ``[queries, keys]`` (forward and dq) read words that hold queries of one key or
  group of keys. They are made once a call, outside of the kernels, by transposing
  squares of 32 x 32 bits. They take one bit for each query and group, as before.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import WORD, PairBits
from pallas_kernels.tpu.runs import LANES, TpuSizes

# The rows of a vector register.
SUBLANES = 8


class RowBits(NamedTuple):
    """How the bits of ``rows`` rows of a tile are packed into words ``[n, columns]``.

    Row ``(piece * bits + i) * step + s`` is bit ``i`` of word ``piece * step + s``.
    ``step`` is a power of two: the rows of a register, or 1.
    """

    rows: int
    step: int
    pieces: int
    bits: int

    @property
    def words(self) -> int:
        """The number of words of a column."""
        return self.pieces * self.step


def by_register(rows: int) -> RowBits:
    """A bit is a register: unpacking then moves nothing."""
    step = math.gcd(rows, SUBLANES)
    pieces = -(-rows // (step * WORD))
    return RowBits(rows, step, pieces, -(-rows // (step * pieces)))


def in_order(rows: int) -> RowBits:
    """Word ``w`` holds the rows from ``32 w`` on."""
    return RowBits(rows, 1, -(-rows // WORD), WORD)


def rows_of(by: Axis, sizes: TpuSizes) -> RowBits:
    """The packing of the rows of a kernel's tiles."""
    return by_register(sizes.block_q) if by == "q" else in_order(sizes.block_kv)


class LaneWindow(NamedTuple):
    """Groups of keys along the lanes, as the forward and dq kernels read them.

    ``planes`` planes of ``lanes`` groups lie in a window of ``width`` lanes.
    """

    lanes: int
    planes: int
    width: int


def window_of_groups(x: PairBits) -> LaneWindow:
    """The smallest window of whole registers that holds a plane."""
    lanes = x.words.shape[3] * WORD
    planes = max(1, LANES // lanes)
    return LaneWindow(lanes, planes, -(-lanes * planes // LANES) * LANES)


def lanes_of_keys(x: PairBits) -> jax.Array | None:
    """The lane of each key in its window; None if the keys have a lane each.

    The bit numbers are ``[1, 1, kv]``.
    """
    if x.keys_per_bit == 1:
        return None
    window = window_of_groups(x)
    key = lax.broadcasted_iota(jnp.int32, x.bit.shape, 2)
    plane = lax.div(key, jnp.full_like(key, x.block_kv * x.blocks_per_plane))
    return x.bit + lax.rem(plane, jnp.full_like(plane, window.planes)) * window.lanes


class Placed(NamedTuple):
    """Words ``[batch, heads, planes, n, length]`` and where a tile reads them.

    ``start(row, block)`` is the plane and the first of ``width`` lanes, a multiple of
    ``step``.
    """

    words: jax.Array
    start: Any
    width: int
    step: int


def placed(x: PairBits, sizes: TpuSizes, by: Axis) -> Placed:
    """The words that a kernel with rows ``by`` reads: each query has its own."""
    x = bits.expanded(x, sizes.q_seq_len)
    if by == "kv":
        return _as_packed(x, sizes)
    if x.diagonal:
        return _differences_by_query(x, sizes)
    return _groups_by_query(x, sizes)


def _as_packed(x: PairBits, sizes: TpuSizes) -> Placed:
    block_q = sizes.block_q
    length = bits.padded_length(x, block_q, sizes.q_seq_len, sizes.kv_seq_len)

    def start(row: Any, block: Any) -> tuple[Any, Any]:
        return bits.window(x, block, row, block_q=block_q, kv_seq_len=sizes.kv_seq_len)

    step = math.gcd(block_q, x.block_kv) if x.diagonal else block_q
    return Placed(_lengthened(x.words, length), start, block_q, step)


def _lengthened(words: jax.Array, length: int) -> jax.Array:
    short = max(0, length - words.shape[-1])
    return jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, short)])


def _groups_by_query(x: PairBits, sizes: TpuSizes) -> Placed:
    words = _queries_as_bits(x.words, sizes)
    *lead, planes, _ = words.shape
    if x.keys_per_bit == 1:
        keys = x.block_kv * x.blocks_per_plane
        # Planes beyond the last key may have fewer words.
        words = _lengthened(words[..., :keys], keys).reshape(*lead, planes * keys)
        width = x.block_kv
        return Placed(words, lambda row, block: (row, block * width), width, width)
    window = window_of_groups(x)
    many, width = window.planes, window.width
    words = jnp.pad(words, [(0, 0)] * 4 + [(0, -planes % many), (0, 0)])
    words = words.reshape(*lead, -1, many * window.lanes)
    words = jnp.pad(words, [(0, 0)] * 5 + [(0, width - words.shape[-1])])
    blocks = x.blocks_per_plane * many

    def start(row: Any, block: Any) -> tuple[Any, Any]:
        return row, bits.quotient(block, blocks) * width

    return Placed(words.reshape(*lead, -1), start, width, width)


def _queries_as_bits(words: jax.Array, sizes: TpuSizes) -> jax.Array:
    """``[b, h, planes, words, q]`` as ``[b, h, q blocks, n, planes, groups]``.

    The words of a block are packed as ``by_register`` says.
    """
    batch, heads, planes, count, _ = words.shape
    rows, blocks = by_register(sizes.block_q), -(-sizes.q_seq_len // sizes.block_q)
    words = _lengthened(words[..., : sizes.q_seq_len], blocks * sizes.block_q)
    # The last axis is always a long one: the chip pads a short one to 128.
    words = jnp.swapaxes(words.reshape(batch, heads, planes * count, -1), 2, 3)
    registers = sizes.block_q // rows.step
    words = words.reshape(batch, heads, blocks, registers, rows.step, -1)
    words = _padded(words, 3, rows.pieces * rows.bits)
    words = words.reshape(batch, heads, -1, rows.bits, rows.step, planes * count)
    words = transposed(_padded(words, 3, WORD))
    # [batch, heads, bits, words of queries, words of groups]
    words = jnp.moveaxis(words, 3, 2).reshape(batch, heads, WORD, -1, planes * count)
    words = jnp.moveaxis(words, 4, 2).reshape(batch, heads, planes * count * WORD, -1)
    words = jnp.swapaxes(words, 2, 3)
    return words.reshape(batch, heads, blocks, rows.words, planes, count * WORD)


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def transposed(words: jax.Array) -> jax.Array:
    """``[..., 32, m, n]``: bit ``j`` of word ``i`` becomes bit ``i`` of word ``j``.

    Squares of bits are exchanged across the diagonal, of 16 x 16 bits first, then of 8
    x 8 within these, down to single bits (Warren, Hacker's Delight, section 7-3).
    """
    *lead, _, m, n = words.shape
    words = lax.bitcast_convert_type(words, jnp.uint32)
    width = WORD // 2
    while width:
        squares = words.reshape(*lead, WORD // (2 * width), 2, width, m, n)
        upper, lower = squares[..., 0, :, :, :], squares[..., 1, :, :, :]
        shift = jnp.uint32(width)
        low = jnp.uint32(sum(1 << i for i in range(WORD) if not i & width))
        swap = ((upper >> shift) ^ lower) & low
        squares = jnp.stack([upper ^ (swap << shift), lower ^ swap], axis=-4)
        words = squares.reshape(*lead, WORD, m, n)
        width //= 2
    return lax.bitcast_convert_type(words, jnp.int32)


def _differences_by_query(x: PairBits, sizes: TpuSizes) -> Placed:
    """Words of which a tile reads a window that depends on its diagonal alone.

    Let ``base`` be the first query of the last block. Lane ``z`` of the words belongs
    to the difference ``row + base - z`` of query and key.
    """
    rows, block_q, block_kv = by_register(sizes.block_q), sizes.block_q, x.block_kv
    base = (-(-sizes.q_seq_len // block_q) - 1) * block_q
    key_end = -(-sizes.kv_seq_len // block_kv) * block_kv
    held = _held_differences(x)
    # Entry y belongs to the difference q_end - 1 - y.
    q_end = base + rows.pieces * rows.bits * rows.step
    count = q_end + key_end - 1
    held = jnp.flip(_lengthened(held, count)[..., :count], -1).astype(jnp.uint32)
    length = base + key_end

    def row(r: int) -> jax.Array:
        first = q_end - 1 - base - r
        return held[..., first : first + length]

    def word(piece: int, s: int) -> jax.Array:
        first = piece * rows.bits * rows.step + s
        found = row(first)
        for i in range(1, rows.bits):
            found = found | (row(first + i * rows.step) << jnp.uint32(i))
        return found

    words = [word(p, s) for p in range(rows.pieces) for s in range(rows.step)]
    words = lax.bitcast_convert_type(jnp.stack(words, axis=-2), jnp.int32)

    def start(row: Any, block: Any) -> tuple[Any, Any]:
        return 0, base - row * block_q + block * block_kv

    return Placed(words, start, block_kv, math.gcd(block_q, block_kv))


def _held_differences(x: PairBits) -> jax.Array:
    """The bits of the differences of ``x``, ascending: ``[batch, heads, 1, count]``."""
    # Bit b of the window at 0 is the difference b below that of the window.
    place = np.arange(x.block_kv - 1, 0, -1, dtype=np.int32)
    first = x.words[..., place // WORD, 0]
    shift = jnp.broadcast_to(place % WORD, first.shape)
    first = lax.shift_right_logical(first, shift)
    return jnp.concatenate([first & 1, x.words[..., 0, :] & 1], axis=-1)
