"""Evaluates hoisted comparisons and packs them into bits that kernels read.

A comparison that looks up a run-time array at both the query and the key is evaluated
outside of the kernel: once for every query and every group of keys that it does not
distinguish, or, if it depends on ``q - k`` alone, once for every difference. The bits
are packed into int32 words, for each query and each plane of key blocks.
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
from lowering.run_time.vectors import AtPositions, evaluate_outside, look_up
from pallas_kernels.call import WORD, PairBits


def pack(
    preds: tuple[ir.Pred, ...],
    lengths: tuple[int, int],
    block_kv: int,
    num_heads: int,
    operands: Mapping[str, Any],
) -> tuple[PairBits, ...]:
    """The bits of hoisted comparisons; ``lengths`` are those of queries and keys.

    Raises:
      NotImplementedError: an index mixes the query and the key, but not as ``q - k``.
    """
    found = []
    for pred in preds:
        build = _of_differences if _is_difference(pred) else _of_groups
        build = _of_packed if _reads_packed(pred, operands) else build
        found.append(build(pred, lengths, block_kv, num_heads, operands))
    return tuple(found)


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
    pred: ir.Pred, lengths: tuple[int, int], block_kv: int, num_heads: int,
    operands: Mapping[str, Any],
) -> PairBits:  # fmt: skip
    """The words of packed bools, moved to their planes; no single bit is looked at."""
    assert isinstance(pred, ir.Eq)
    assert isinstance(pred.left, ir.Operand)
    values, (*index, column) = operands[pred.left.name], pred.left.index
    q_seq_len, kv_seq_len = lengths
    found = key_groups(pred, kv_seq_len, block_kv)
    first = _first_columns(found, column, values.length)
    if first is None:
        return _of_groups(pred, lengths, block_kv, num_heads, operands)
    moved = values.windows(first.reshape(-1))
    words = _by_query(moved, tuple(index), (num_heads, *lengths), operands)
    return PairBits(
        words.reshape(*words.shape[:2], *first.shape, q_seq_len),
        found.group,
        block_kv,
        blocks_per_plane=found.blocks,
        keys_per_bit=keys_per_group(found, block_kv),
    )


def _by_query(
    words: jax.Array,
    index: tuple[ir.Expr, ...],
    sizes: tuple[int, int, int],
    operands: Mapping[str, Any],
) -> jax.Array:
    """``words [batch, ..., word]`` at the index of each head and query, with the word.

    ``sizes`` are those of heads, queries and keys. Returns ``[batch, heads or 1, words,
    queries]``.
    """
    num_heads, q_seq_len, _ = sizes
    by_head = words[:, None] if index == (ir.Q,) else words
    if index in ((ir.Q,), (ir.H, ir.Q)) and by_head.shape[1:3] in (
        (1, q_seq_len),
        (num_heads, q_seq_len),
    ):
        return jnp.swapaxes(by_head, 2, 3)
    at = AtPositions(
        jnp.arange(q_seq_len, dtype=jnp.int32).reshape(1, 1, 1, -1),
        jnp.zeros((1,) * 4, jnp.int32),
        h=jnp.arange(num_heads, dtype=jnp.int32).reshape(1, -1, 1, 1),
        operands=operands,
    )
    known = known_of(q_seq_len, sizes[2], num_heads)
    rows = [evaluate_outside(i, at, known) for i in index]
    word = jnp.arange(words.shape[-1], dtype=jnp.int32).reshape(1, 1, -1, 1)
    found = look_up(words, (*rows, word), 4)
    return jnp.broadcast_to(found, (*found.shape[:3], q_seq_len))


def _first_columns(
    groups: "KeyGroups", column: ir.Expr, length: int
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
    pred: ir.Pred, lengths: tuple[int, int], block_kv: int, num_heads: int,
    operands: Mapping[str, jax.Array],
) -> PairBits:  # fmt: skip
    q_seq_len, kv_seq_len = lengths
    found = key_groups(pred, kv_seq_len, block_kv)
    planes, count = found.member.shape
    num_words, bits = -(-count // WORD), min(count, WORD)
    spare = num_words * bits - count
    member = np.pad(found.member, ((0, 0), (0, spare)), mode="edge")
    # [batch, heads, planes, words, bits, queries]
    at = AtPositions(
        jnp.arange(q_seq_len, dtype=jnp.int32).reshape(1, 1, 1, 1, 1, -1),
        jnp.asarray(member, jnp.int32).reshape(1, 1, planes, num_words, bits, 1),
        h=jnp.arange(num_heads, dtype=jnp.int32).reshape(1, -1, 1, 1, 1, 1),
        operands=operands,
    )
    known = known_of(q_seq_len, kv_seq_len, num_heads)
    words = _word(evaluate_outside(pred, at, known), 4)
    words = jnp.broadcast_to(words, (*words.shape[:4], q_seq_len))
    return PairBits(
        words,
        found.group,
        block_kv,
        blocks_per_plane=found.blocks,
        keys_per_bit=keys_per_group(found, block_kv),
    )


class KeyGroups(NamedTuple):
    """Groups of keys that no index distinguishes, numbered from 0 in each plane.

    A plane is some consecutive blocks of keys that share words of bits.
    """

    group: np.ndarray  # int32 [kv_seq_len]
    member: np.ndarray  # [planes, most groups]: a key of each group, padded by repeats
    blocks: int  # key blocks in a plane


def key_groups(pred: ir.Pred, kv_seq_len: int, block_kv: int) -> KeyGroups:
    """The groups, with as many blocks in a plane as fit one word, at least one."""
    k = np.arange(kv_seq_len)
    reads = [n for n in _outermost(pred) if "k" in ir.axes(n)]
    if any(isinstance(n, ir.Operand) for node in reads for n in ir.walk(node)):
        reads = [ir.K]
    at = NumPy(np.zeros_like(k), k)
    values = [np.broadcast_to(evaluate(node, at), k.shape) for node in reads]
    best = _grouped(k // block_kv, values, 1)
    while best.blocks * block_kv < kv_seq_len:
        wider = _grouped(k // block_kv, values, 2 * best.blocks)
        if wider.member.shape[1] > WORD:
            break
        best = wider
    return best


def _grouped(block: np.ndarray, values: list[np.ndarray], blocks: int) -> KeyGroups:
    columns = np.stack([block // blocks, *values])
    found = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    # Numbers the groups by their first key, and so plane by plane.
    order = np.argsort(found[1])
    key, label = found[1][order], np.argsort(order)[found[2].reshape(-1)]
    plane = columns[0][key]
    start = np.searchsorted(plane, np.arange(columns[0][-1] + 1))
    group = label - start[columns[0]]
    member = np.repeat(key[start][:, None], group.max() + 1, axis=1)
    member[plane, np.arange(len(key)) - start[plane]] = key
    return KeyGroups(group.astype(np.int32), member, blocks)


def keys_per_group(groups: KeyGroups, block_kv: int) -> int | None:
    """The keys of a group if all groups have as many, in the order of keys."""
    key = np.arange(len(groups.group)) % (block_kv * groups.blocks)
    # The keys before the first that is not of group 0.
    others = np.flatnonzero(groups.group[: block_kv * groups.blocks])
    size = int(others[0]) if len(others) else block_kv * groups.blocks
    return size if np.array_equal(groups.group, key // size) else None


def _outermost(node: ir.Node) -> list[ir.Expr]:
    """The largest expressions that read the key and not the query."""
    if isinstance(node, ir.Expr) and ir.axes(node) - {"h"} == {"k"}:
        return [node]
    return [found for child in ir.children(node) for found in _outermost(child)]


def _of_differences(
    pred: ir.Pred, lengths: tuple[int, int], block_kv: int, num_heads: int,
    operands: Mapping[str, jax.Array],
) -> PairBits:  # fmt: skip
    q_seq_len, kv_seq_len = lengths
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
    folded = _folded(bits.words, block_q, q_seq_len, fold)
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
