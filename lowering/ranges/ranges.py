"""Interval analysis: the range of an integer expression on rectangles of pairs.

Every number is an array with one entry for each rectangle. The array namespace is NumPy
when planning; at run time it is jnp where something is traced. Ranges are always sound,
and exact where an expression reads each variable once. Each rule below has its formula
above it; ``[l, h]`` is the range of an operand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, assert_never

import numpy as np

from lowering import ir
from lowering.ranges.digit_reads import (
    Read,
    Reads,
    digit_read,
    digits_differ,
    is_box,
    places_of,
    shared_axes,
)
from lowering.ranges.extremes import bounds_of, integers, log2_of

# A run-time array may hold any int32: -ANYTHING .. ANYTHING - 1.
ANYTHING = 1 << 31


class Rectangles(NamedTuple):
    """Inclusive bounds of queries and keys: int arrays ``[rectangles]``."""

    q_min: Any
    q_max: Any
    k_min: Any
    k_max: Any


class Range(NamedTuple):
    """The values of an expression: within ``low .. high``, all ``≡ low (mod step)``.

    ``tight``: both ends are attained. ``dense``: every value of that form is attained.
    ``covers``: the expression takes at least this many consecutive values in any leaf
    tile. ``reads``: the positions and digits that the expression depends on.
    """

    low: Any
    high: Any
    step: int
    tight: Any
    dense: Any
    covers: int
    reads: Reads


@dataclass(frozen=True)
class Ranges:
    """Computes ranges on rectangles: one object a level, called on expressions.

    ``leaf`` is the smallest (queries, keys) of a leaf tile. ``operands`` gives the
    range ``(low, high)`` of a run-time array (hoisted or not) over each rectangle,
    where known; for hoisted bits, whether some may hold and whether all do. ``rough``:
    only the ends and the step are wanted, and ``tight``, ``dense``, ``covers`` and
    ``reads`` say nothing.
    """

    at: Rectangles
    leaf: tuple[int, int] = (1, 1)
    xp: Any = np
    operands: Mapping[ir.Operand | ir.Hoisted | ir.HoistedBits, tuple] | None = None
    rough: bool = False
    # Digits of positions occur in many comparisons; each is analysed once.
    seen: dict[ir.Expr, Range] = field(default_factory=dict, compare=False)
    boxes: dict[tuple[str, tuple[int, ...]], Any] = field(
        default_factory=dict, compare=False
    )

    def __call__(self, node: ir.Expr) -> Range:
        """The range of ``node`` on every rectangle."""
        found = self.seen.get(node)
        if found is None:
            found = self.seen[node] = self._range(node)
        return found

    def free(self, a: Reads, b: Reads) -> Any:
        """Whether two values vary independently: a bool, or one a rectangle."""
        shared = shared_axes(a, b)
        if not shared or not digits_differ(a, b):
            return not shared
        if not shared <= {"q", "k"}:
            return False
        found = True
        for axis in sorted(shared):
            key = axis, places_of(a | b, axis)
            if key not in self.boxes:
                self.boxes[key] = self._is_box(*key)
            found = found & self.boxes[key]
        return found

    def _is_box(self, axis: str, places: tuple[int, ...]) -> Any:
        at = self.at
        low, high = (at.q_min, at.q_max) if axis == "q" else (at.k_min, at.k_max)
        length = high - low + 1
        if self.xp is np and length.size and length.min() == length.max():
            # One length for all, as on most levels: one answer but for the alignment.
            length = int(length.min())
            if not is_box(0, length - 1, places):
                return False
            return _rem(low, length) == 0
        return is_box(low, high, places)

    def _range(self, node: ir.Expr) -> Range:
        read = digit_read(node)
        found = self._combine(node)
        return found if read is None else found._replace(reads=frozenset({read}))

    def _combine(self, node: ir.Expr) -> Range:
        match node:
            case ir.Var("q"):
                return self._position(self.at.q_min, self.at.q_max, self.leaf[0], "q")
            case ir.Var("k"):
                return self._position(self.at.k_min, self.at.k_max, self.leaf[1], "k")
            case ir.Var(axis):
                raise AssertionError(f"{axis} is resolved before bounds are taken")
            case ir.Const(value):
                at = self.at.q_min * 0 + value
                return Range(at, at, 1, True, True, 1, frozenset())
            case ir.Add(a, b):
                return self._add(self(a), self(b))
            case ir.Mul(a, n):
                return self._mul(self(a), n)
            case ir.FloorDiv(a, n):
                return self._floor_div(self(a), n)
            case ir.Mod(a, n):
                return self._mod(self(a), n)
            case ir.Min(a, b):
                return self._pick(self.xp.minimum, self(a), self(b))
            case ir.Max(a, b):
                return self._pick(self.xp.maximum, self(a), self(b))
            case ir.Log2(a):
                return self._log2(self(a))
            case ir.Within(a, _):
                return self(a)
            case ir.Table(values, index):
                return self._table(values, self(index))
            case ir.Operand() | ir.Hoisted():
                return self._operand(node)
        assert_never(node)

    def _position(self, low: Any, high: Any, covers: int, axis: str) -> Range:
        return Range(low, high, 1, True, True, covers, frozenset({Read(axis)}))

    # [l, h] + [m, i] == [l + m, h + i]
    def _add(self, a: Range, b: Range) -> Range:
        if self.rough:
            return _ends(a.low + b.low, a.high + b.high, int(np.gcd(a.step, b.step)))
        free = self.free(a.reads, b.reads)
        if free is True:
            return self._add_free(a, b)
        tied = self._add_tied(a, b)
        if free is False:
            return tied
        other = self._add_free(a, b)
        if other.step != tied.step:
            return tied._replace(tight=tied.tight | (free & other.tight))
        return tied._replace(
            tight=tied.tight | (free & other.tight),
            dense=tied.dense | (free & other.dense),
        )

    def _add_tied(self, a: Range, b: Range) -> Range:
        """The sum of two ranges that may not attain their ends at the same pair."""
        low, high = a.low + b.low, a.high + b.high
        step = int(np.gcd(a.step, b.step))
        still_a, still_b = a.low == a.high, b.low == b.high
        tight = (still_a & b.tight) | (still_b & a.tight)
        dense = still_a & still_b
        if b.step == step:
            dense = dense | (still_a & b.dense)
        if a.step == step:
            dense = dense | (still_b & a.dense)
        return Range(low, high, step, tight, dense, 1, a.reads | b.reads)

    def _add_free(self, a: Range, b: Range) -> Range:
        """The sum of two ranges that vary independently."""
        low, high = a.low + b.low, a.high + b.high
        reads = a.reads | b.reads
        if not a.reads or not b.reads:
            moving = a if a.reads else b
            dense, tight = a.dense & b.dense, a.tight & b.tight
            return Range(low, high, moving.step, tight, dense, moving.covers, reads)
        step, wide = sorted((a.step, b.step))
        fine, coarse = (a, b) if a.step <= b.step else (b, a)
        # Copies of the finer range, ``wide`` apart, leave no gap if it is long enough.
        fills = (fine.high - fine.low + step >= wide) | (coarse.low == coarse.high)
        dense = a.dense & b.dense & (wide % step == 0) & fills
        covers = a.covers + b.covers - 1 if a.step == b.step == 1 else 1
        step = int(np.gcd(step, wide))
        return Range(low, high, step, a.tight & b.tight, dense, covers, reads)

    # [l, h] * n == [l n, h n], or [h n, l n] if n < 0; the step becomes |n| step
    def _mul(self, a: Range, n: int) -> Range:
        low, high = (a.low * n, a.high * n) if n >= 0 else (a.high * n, a.low * n)
        covers = a.covers if abs(n) == 1 else 1
        return a._replace(
            low=low, high=high, step=max(a.step * abs(n), 1), covers=covers
        )

    # [l, h] // n == [l // n, h // n]; no value is skipped if step <= n
    def _floor_div(self, a: Range, n: int) -> Range:
        low, high = _div(a.low, n), _div(a.high, n)
        step = a.step // n if a.step % n == 0 else 1
        if self.rough:
            return _ends(low, high, step)
        close = a.step % n == 0 or a.step <= n
        dense = a.dense & (close | (low == high))
        covers = -(-a.covers // n) if a.step == 1 else 1
        return a._replace(low=low, high=high, step=step, dense=dense, covers=covers)

    # [l, h] % n == [l % n, h % n]  if l // n == h // n
    # else the residues ≡ l (mod gcd(step, n)) in 0 .. n - 1
    def _mod(self, a: Range, n: int) -> Range:
        same = _div(a.low, n) == _div(a.high, n)
        step = int(np.gcd(a.step, n))
        least = _rem(a.low, step)
        low = self.xp.where(same, _rem(a.low, n), least)
        high = self.xp.where(same, _rem(a.high, n), n - step + least)
        if self.rough:
            return _ends(low, high, step)
        # n / step consecutive values, a.step apart, take every possible residue.
        wraps = a.high - a.low + a.step >= (n // step) * a.step
        keeps_step = a.step == step
        dense = a.dense & (wraps | (same & (keeps_step | (a.low == a.high))))
        tight = a.dense & wraps | (same & a.tight)
        covers = n if a.covers >= n else 1
        return Range(low, high, step, tight, dense, covers, a.reads)

    # min([l, h], [m, i]) == [min(l, m), min(h, i)], and the same of max
    def _pick(self, pick: Any, a: Range, b: Range) -> Range:
        low, high = pick(a.low, b.low), pick(a.high, b.high)
        step = a.step if a.step == b.step == 1 else 1
        if self.rough:
            return _ends(low, high, step)
        # One operand is the result throughout, or the two vary independently.
        apart = (a.high <= b.low) | (b.high <= a.low)
        free = self.free(a.reads, b.reads)
        tight = a.tight & b.tight & (apart | free)
        dense = a.dense & b.dense & (a.step == 1) & (b.step == 1)
        dense = (dense & (apart | free)) | (tight & (low == high))
        return Range(low, high, step, tight, dense, 1, a.reads | b.reads)

    # floor_log2([l, h]) == [floor_log2(l), floor_log2(h)]; no value is skipped
    def _log2(self, a: Range) -> Range:
        low, high = (log2_of(self.xp, x) for x in (a.low, a.high))
        dense = a.dense & ((a.step == 1) | (low == high))
        return Range(low, high, 1, a.tight, dense, 1, a.reads)

    # table[[l, h]] == [min(table[l .. h]), max(table[l .. h])]
    def _table(self, values: tuple[int, ...], index: Range) -> Range:
        low, high = bounds_of(self.xp, values, index.low, index.high)
        tight = index.dense & (index.step == 1)
        dense = (low == high) | (tight & (high - low <= 1))
        return Range(low, high, 1, tight, dense, 1, index.reads)

    def _operand(self, node: ir.Operand | ir.Hoisted) -> Range:
        axes = ir.axes(node) or frozenset({str(node)})
        reads = frozenset(Read(axis) for axis in axes)
        if self.operands is None or node not in self.operands:
            at = self.at.q_min * 0
            return Range(at - ANYTHING, at + (ANYTHING - 1), 1, False, False, 1, reads)
        low, high = self.operands[node]
        if self.rough:
            return _ends(low, high, 1)
        return Range(low, high, 1, True, (high - low) <= 1, 1, reads)

    def with_entry(self, table: ir.Table, entry: Any) -> "Ranges":
        """The same ranges if ``table`` is looked up at ``entry`` only."""
        inside = self.xp.clip(entry, 0, len(table.values) - 1)
        value = integers(self.xp, table.values)[inside]
        reads = self(table.index).reads
        fixed = Range(value, value, 1, True, True, 1, reads)
        return replace(self, seen={table: fixed})


def _ends(low: Any, high: Any, step: int) -> Range:
    """A range of which only the ends and the step are known."""
    return Range(low, high, step, False, False, 1, frozenset())


def _div(x: Any, n: int) -> Any:
    """``x // n``; for a power of two a shift, which is several times faster."""
    return x // n if n & (n - 1) else x >> (n.bit_length() - 1)


def _rem(x: Any, n: int) -> Any:
    """``x % n``; for a power of two a bitwise and, which is several times faster."""
    return x % n if n & (n - 1) else x & (n - 1)
