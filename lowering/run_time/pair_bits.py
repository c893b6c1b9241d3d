"""Evaluates hoisted comparisons and packs them into bits that kernels read.

A comparison that looks up a run-time array at both the query and the key is evaluated
outside of the kernel: once for every group of queries and every group of keys that it
does not distinguish, or, if it depends on ``q - k`` alone, once for every difference.
The bits are packed into int32 words, for each group of queries and each plane of key
blocks.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.fits import INT32, known_of
from lowering.expr.printing import show
from lowering.expr.simplify import sum_of
from lowering.expr.static_range import Known, Span
from lowering.run_time.packed import PackedBools
from lowering.run_time.pair_groups import (
    KeyGroups,
    key_groups,
    keys_per_group,
    queries_per_word,
)
from lowering.run_time.vectors import AtPositions, evaluate_outside, look_up
from pallas_kernels.bits import words_of_block
from pallas_kernels.call import WORD, PairBits


def pack(
    preds: tuple[ir.Pred, ...],
    lengths: tuple[int, int],
    block_kv: int,
    num_heads: int,
    operands: Mapping[str, Any],
    blocks_q: tuple[int, ...],
) -> tuple[PairBits, ...]:
    """The bits of hoisted comparisons; ``lengths`` are those of queries and keys.

    ``blocks_q`` are the query blocks of the kernels that read them.

    Raises:
      NotImplementedError: an index mixes the query and the key, but not as ``q - k``.
    """
    found = []
    for pred in preds:
        build, shared = _of_differences, 1
        if not _is_difference(pred):
            build = _of_packed if _reads_packed(pred, operands) else _of_groups
            shared = queries_per_word(pred, lengths[0], blocks_q)
        sizes = _Sizes(num_heads, *lengths, shared)
        found.append(build(pred, sizes, block_kv, operands))
    return tuple(found)


class _Sizes(NamedTuple):
    """The sizes of a call, ``shared`` neighbouring queries of which share words."""

    heads: int
    q_seq_len: int
    kv_seq_len: int
    shared: int

    @property
    def groups(self) -> int:
        """The number of groups of queries."""
        return -(-self.q_seq_len // self.shared)

    @property
    def known(self) -> Known:
        """The spans of positions and heads."""
        return known_of(self.q_seq_len, self.kv_seq_len, self.heads)

    def at(self, key: jax.Array, operands: Mapping[str, jax.Array]) -> AtPositions:
        """The first query of each group on the last axis, heads on the second."""
        first = jnp.arange(0, self.q_seq_len, self.shared, dtype=jnp.int32)
        head = jnp.arange(self.heads, dtype=jnp.int32)
        ones = (1,) * (key.ndim - 2)
        q, h = first.reshape(1, *ones, -1), head.reshape(1, -1, *ones)
        return AtPositions(q, key, h=h, operands=operands)


def _reads_packed(pred: ir.Pred, operands: Mapping[str, Any]) -> bool:
    """Whether it is ``array[..., k] == 1`` of packed bools: words, but for the order.

    The last index depends on the key alone, the others on the query and the head.
    """
    match pred:
        case ir.Eq(ir.Operand(name, (*rows, column)), ir.Const(1)):
            packed = isinstance(operands.get(name), PackedBools)
            plain = not ir.operand_names(column) and ir.axes(column) == {"k"}
            return packed and plain and not any("k" in ir.axes(i) for i in rows)
    return False


def _of_packed(
    pred: ir.Pred, sizes: _Sizes, block_kv: int, operands: Mapping[str, Any]
) -> PairBits:
    """The words of packed bools, moved to their planes; no single bit is looked at."""
    assert isinstance(pred, ir.Eq)
    assert isinstance(pred.left, ir.Operand)
    values, (*index, column) = operands[pred.left.name], pred.left.index
    found = key_groups(pred, sizes.kv_seq_len, block_kv)
    first = _first_columns(found, column, values.length)
    if first is None:
        return _of_groups(pred, sizes, block_kv, operands)
    moved = values.windows(first.reshape(-1))
    words = _by_query(moved, tuple(index), sizes, operands)
    words = words.reshape(*words.shape[:2], *first.shape, sizes.groups)
    return _with_words(words, found, block_kv, sizes)


def _by_query(
    words: jax.Array,
    index: tuple[ir.Expr, ...],
    sizes: _Sizes,
    operands: Mapping[str, Any],
) -> jax.Array:
    """``words [batch, ..., word]`` at the index of each head and query, with the word.

    Returns ``[batch, heads or 1, words, groups of queries]``.
    """
    by_head = words[:, None] if index == (ir.Q,) else words
    if index in ((ir.Q,), (ir.H, ir.Q)) and by_head.shape[1:3] in (
        (1, sizes.groups),
        (sizes.heads, sizes.groups),
    ):
        return jnp.swapaxes(by_head, 2, 3)
    at = sizes.at(jnp.zeros((1,) * 4, jnp.int32), operands)
    rows = [evaluate_outside(i, at, sizes.known) for i in index]
    word = jnp.arange(words.shape[-1], dtype=jnp.int32).reshape(1, 1, -1, 1)
    found = look_up(words, (*rows, word), 4)
    return jnp.broadcast_to(found, (*found.shape[:3], sizes.groups))


def _first_columns(
    groups: KeyGroups, column: ir.Expr, length: int
) -> np.ndarray | None:
    """The column of the first bit of every word, ``[planes, words]``.

    None if the groups of some word are not consecutive columns below ``length``.
    """
    member = groups.member
    found = np.asarray(evaluate(column, NumPy(np.zeros_like(member), member)))
    first, place = found[:, ::WORD], np.arange(member.shape[1])
    wanted = first[:, place // WORD] + place % WORD
    # A plane with fewer groups repeats its first key; no key has those bits.
    real = (place == 0) | (member != member[:, :1])
    fits = (found == wanted) & (found >= 0) & (found < length)
    return first if (fits | ~real).all() else None


def _is_difference(pred: ir.Pred) -> bool:
    """Whether the comparison depends on a pair by ``q - k`` alone.

    Raises:
      NotImplementedError: an index mixes query and key in another way.
    """
    mixed = [
        i
        for n in ir.walk(pred)
        if isinstance(n, ir.Operand)
        for i in n.index
        if {"q", "k"} <= ir.axes(i)
    ]
    if not mixed:
        return False
    if all(_reads_difference(child) for child in ir.children(pred)):
        return True
    raise NotImplementedError(
        f"`{show(pred)}` looks up a run-time array at `{show(mixed[0])}`: kernels take "
        "an index of the query alone, of the key alone, or, where the whole comparison "
        "depends on nothing else, of q - k; use impl='reference' for others"
    )


def _reads_difference(node: ir.Node) -> bool:
    axes = ir.axes(node) & {"q", "k"}
    if not axes:
        return True
    if isinstance(node, ir.Add | ir.Mul | ir.Var):
        terms, _ = sum_of(node)
        factors = terms.get(ir.Q, 0) + terms.get(ir.K, 0)
        others = [atom for atom in terms if atom not in (ir.Q, ir.K)]
        return factors == 0 and all(_reads_difference(atom) for atom in others)
    return all(_reads_difference(child) for child in ir.children(node))


def _of_groups(
    pred: ir.Pred, sizes: _Sizes, block_kv: int, operands: Mapping[str, jax.Array]
) -> PairBits:
    found = key_groups(pred, sizes.kv_seq_len, block_kv)
    planes, count = found.member.shape
    num_words, bits = -(-count // WORD), min(count, WORD)
    spare = num_words * bits - count
    member = np.pad(found.member, ((0, 0), (0, spare)), mode="edge")
    # [batch, heads, planes, words, bits, groups of queries]
    key = jnp.asarray(member, jnp.int32).reshape(1, 1, planes, num_words, bits, 1)
    held = evaluate_outside(pred, sizes.at(key, operands), sizes.known)
    words = _word(held, 4)
    words = jnp.broadcast_to(words, (*words.shape[:4], sizes.groups))
    return _with_words(words, found, block_kv, sizes)


def _with_words(
    words: jax.Array, groups: KeyGroups, block_kv: int, sizes: _Sizes
) -> PairBits:
    return PairBits(
        words,
        groups.group,
        block_kv,
        blocks_per_plane=groups.blocks,
        keys_per_bit=keys_per_group(groups, block_kv),
        queries_per_word=sizes.shared,
    )


def _of_differences(
    pred: ir.Pred, sizes: _Sizes, block_kv: int, operands: Mapping[str, jax.Array]
) -> PairBits:
    num_heads, q_seq_len, kv_seq_len, _ = sizes
    start = (-(-kv_seq_len // block_kv) - 1) * block_kv
    num_words = -(-block_kv // WORD)
    before = num_words * WORD - 1
    # Word windows at x hold the differences x - start down to x - start - before; the
    # array has each difference once.
    difference = np.arange(-before, q_seq_len + start, dtype=np.int32) - start
    at = AtPositions(
        jnp.asarray(difference).reshape(1, 1, -1),
        jnp.zeros((1,) * 3, jnp.int32),
        h=jnp.arange(num_heads, dtype=jnp.int32).reshape(1, -1, 1),
        operands=operands,
    )
    # The key is 0, and the query takes all differences.
    most = q_seq_len + kv_seq_len + 2 * block_kv
    axes: dict[ir.Axis, Span] = {"q": (-most, most), "k": (0, 0), "h": (0, num_heads)}
    held = evaluate_outside(pred, at, Known(axes, INT32))
    held = jnp.broadcast_to(held, (*held.shape[:2], len(difference)))
    words = _windows(held, num_words)[:, :, None]
    key = np.arange(kv_seq_len, dtype=np.int32) % block_kv
    return PairBits(words, key, block_kv, diagonal=True, keys_per_bit=1)


def _windows(held: jax.Array, num_words: int) -> jax.Array:
    """Words ``[..., words, x]`` of windows: 32 consecutive bits each.

    Bit ``i`` of word ``w`` at ``x`` is ``held[..., before + x - 32 w - i]``;
    ``before`` is ``32 * num_words - 1``.
    """
    words, width = held.astype(jnp.uint32), 1
    while width < WORD:
        # Joins the bits of two adjacent windows.
        later, earlier = words[..., width:], words[..., :-width]
        words = later | (earlier << jnp.uint32(width))
        width *= 2
    length = words.shape[-1] - (num_words - 1) * WORD
    ends = [words.shape[-1] - length - w * WORD for w in range(num_words)]
    found = jnp.stack([words[..., i : i + length] for i in ends], axis=-2)
    return jax.lax.bitcast_convert_type(found, jnp.int32)


def _word(held: jax.Array, axis: int) -> jax.Array:
    """Packs bools along ``axis`` into words; that axis is dropped."""
    shape = [1] * held.ndim
    shape[axis] = held.shape[axis]
    place = jnp.arange(held.shape[axis], dtype=jnp.uint32).reshape(shape)
    place = jnp.left_shift(jnp.ones_like(place), place)
    bits = jnp.where(held, place, jnp.zeros_like(place))
    total = jnp.sum(bits, axis=axis, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(total, jnp.int32)


def held_in_blocks(bits: PairBits, block_q: int, q_seq_len: int) -> tuple[Any, Any]:
    """Whether in each block some pair may have its bit, and whether all pairs have it.

    Returns:
      Two bool arrays ``[batch or 1, heads or 1, q blocks, kv blocks]``.
    """
    windows = _sliding if bits.diagonal else _standing
    some = windows(bits, block_q, q_seq_len, (jax.lax.bitwise_or, 0))
    every = windows(bits, block_q, q_seq_len, (jax.lax.bitwise_and, -1))
    used = _used(bits)
    # [batch, heads, kv blocks, words, q blocks]
    held = jnp.any(some & used != 0, axis=3), jnp.all(~every & used == 0, axis=3)
    some, every = (jnp.swapaxes(x, 2, 3) for x in held)
    return some, every


def _used(bits: PairBits) -> jax.Array:
    """The bits that some key of a block uses, ``[1, 1, blocks, words, 1]``."""
    bit = np.asarray(bits.bit)
    blocks = -(-len(bit) // bits.block_kv)
    used = np.zeros((blocks, bits.words.shape[3] * WORD), bool)
    used[np.arange(len(bit)) // bits.block_kv, bit] = True
    place = np.uint32(1) << np.arange(WORD, dtype=np.uint32)
    words = (used.reshape(blocks, -1, WORD) * place).sum(axis=-1, dtype=np.uint32)
    return jnp.asarray(words.view(np.int32))[None, None, :, :, None]


# An associative function of two arrays of words, and its neutral word.
Fold = tuple[Any, int]


def _folded(words: jax.Array, size: int, length: int, fold: Fold) -> jax.Array:
    """Folds each block of ``size`` along the last axis, of ``length`` entries."""
    _, neutral = fold
    blocks = -(-length // size)
    widths = [(0, 0)] * (words.ndim - 1) + [(0, blocks * size - words.shape[-1])]
    words = jnp.pad(words, widths, constant_values=neutral)
    return _combined(words.reshape(*words.shape[:-1], blocks, size), fold)


def _combined(words: jax.Array, fold: Fold) -> jax.Array:
    """Folds the last axis, half of it at a time.

    XLA has no bitwise reduction of sharded arrays: "UNIMPLEMENTED: reduction".
    """
    combine, neutral = fold
    while (size := words.shape[-1]) > 1:
        half = -(-size // 2)
        odd = [(0, 0)] * (words.ndim - 1) + [(0, 2 * half - size)]
        words = jnp.pad(words, odd, constant_values=neutral)
        words = combine(words[..., :half], words[..., half:])
    return words[..., 0]


def _standing(bits: PairBits, block_q: int, q_seq_len: int, fold: Fold) -> jax.Array:
    size = words_of_block(bits, block_q)
    folded = _folded(bits.words, size, bits.words.shape[-1], fold)
    rows = -(-q_seq_len // block_q)
    # Blocks within a group of queries read the same words.
    again = bits.queries_per_word * size // block_q
    folded = jnp.repeat(folded, again, axis=-1)[..., :rows]
    block = np.arange(-(-len(bits.bit) // bits.block_kv))
    return folded[:, :, block // bits.blocks_per_plane]


def _sliding(bits: PairBits, block_q: int, q_seq_len: int, fold: Fold) -> jax.Array:
    """As ``_standing``, for bits by difference: each block reads a window of words.

    Beyond the last query, windows include differences of other pairs. That is sound.
    """
    blocks = -(-len(bits.bit) // bits.block_kv)
    start = (blocks - 1) * bits.block_kv
    rows = -(-q_seq_len // block_q)
    # Windows start at multiples of ``step``, and are several steps long.
    step = math.gcd(block_q, bits.block_kv)
    steps = _folded(bits.words[:, :, 0], step, rows * block_q + start, fold)
    window = np.arange(block_q // step)
    first = np.arange(rows) * block_q - np.arange(blocks)[:, None] * bits.block_kv
    at = ((first + start) // step)[..., None] + window
    return _combined(jnp.moveaxis(steps[..., at], 2, 3), fold)
