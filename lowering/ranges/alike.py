"""Finds the rectangles on which a predicate is the same, but for a shift.

On a rectangle that begins at ``(q0, k0)``, an expression is ``base + f(x, y)``, with
``q = q0 + x`` and ``k = k0 + y``. The base is a number, and a few other numbers, the
marks, determine the function ``f``. A comparison of the expression with a constant is
then the same on all rectangles with an equal base and equal marks; where the range of
the expression decides the comparison, they do not matter. ``q - k <= 512`` thus has few
cases however many rectangles there are, and so have ``k % 64 == q % 64`` and
``k <= 4``.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import array_of, floor_log2
from lowering.ranges.verdicts import Analysis

# Keys of rectangles stay below this bound, which int64 can hold.
MOST = 1 << 62
# The bits of a word that marks are packed into.
WORD = 40


class Shape(NamedTuple):
    """An expression on each rectangle: ``base`` plus a function that ``marks`` tell.

    ``base`` is an int array ``[rectangles]``, or one number for all; so is each mark.
    """

    base: Any
    marks: tuple[Any, ...]


class Alike:
    """Computes marks on some rectangles of an analysis, whose verdicts it shares.

    ``which`` are the numbers of these rectangles.
    """

    def __init__(self, analysis: Analysis, which: np.ndarray) -> None:
        self.analysis, self.which = analysis, which
        self._seen: dict[ir.Expr, Shape] = {}
        # The rectangles on which the value of an expression matters.
        self._matters: dict[ir.Expr, np.ndarray] = {}
        self._bits = _Bits(len(which))

    def marks(self, *nodes: ir.Pred) -> list[np.ndarray]:
        """Rectangles of one size with equal marks hold the same pairs of all nodes.

        The marks are int arrays ``[rectangles]``.
        """
        everywhere = np.ones(len(self.which), bool)
        for node in nodes:
            self._note(node, everywhere)
        marks = self._bits.words
        for expr, where in self._matters.items():
            shape = self._shape(expr)
            marks += [np.where(where, mark, 0) for mark in (shape.base, *shape.marks)]
        return marks

    # --- predicates ---

    def _note(self, node: ir.Pred, where: np.ndarray) -> None:
        """Notes what decides ``node`` on the rectangles where it matters."""
        if isinstance(node, ir.Bool):
            return
        verdict = self.analysis(node)
        none, every = self._of(verdict.none), self._of(verdict.all)
        self._bits.add(where & none)
        self._bits.add(where & every)
        where = where & ~(none | every)
        match node:
            case ir.And(terms) | ir.Or(terms):
                for term in terms:
                    self._note(term, where)
            case ir.Not(term):
                self._note(term, where)
            case ir.Le(a, ir.Const()) | ir.Eq(a, ir.Const()):
                self._note_expr(a, where)
            case ir.In(a, _) | ir.PowerOfTwo(a):
                self._note_expr(a, where)
            case ir.Le(a, b) | ir.Eq(a, b):
                self._note_expr(ir.Add(a, ir.Mul(b, -1)), where)
            case _:
                raise AssertionError(f"{type(node).__name__} is resolved by now")

    def _note_expr(self, expr: ir.Expr, where: np.ndarray) -> None:
        before = self._matters.get(expr)
        self._matters[expr] = where if before is None else before | where

    def _of(self, x: Any) -> Any:
        """The values of all rectangles at those that are looked at."""
        return x[self.which] if np.ndim(x) else x

    def _within(self, node: ir.Expr) -> tuple[Any, Any]:
        found = self.analysis.ranges(node)
        return self._of(found.low), self._of(found.high)

    # --- expressions ---

    def _shape(self, node: ir.Expr) -> Shape:
        found = self._seen.get(node)
        if found is None:
            found = self._seen[node] = self._compute(node)
        return found

    def _compute(self, node: ir.Expr) -> Shape:
        at = self.analysis.at
        match node:
            case ir.Var("q"):
                return Shape(self._of(at.q_min), ())
            case ir.Var("k"):
                return Shape(self._of(at.k_min), ())
            case ir.Const(value):
                return Shape(value, ())
            # (b + f) + (c + g) == (b + c) + (f + g)
            case ir.Add(a, b):
                x, y = self._shape(a), self._shape(b)
                return Shape(x.base + y.base, x.marks + y.marks)
            # (b + f) n == b n + f n
            case ir.Mul(a, n):
                x = self._shape(a)
                return Shape(x.base * n, x.marks)
            case ir.Within(a, _):
                return self._shape(a)
            case ir.FloorDiv(a, n):
                return _floor_div(self._shape(a), *self._within(a), n)
            case ir.Mod(a, n):
                return _mod(self._shape(a), *self._within(a), n)
            case ir.Min(a, b):
                return self._pick(a, b, least=True)
            case ir.Max(a, b):
                return self._pick(a, b, least=False)
            case ir.Log2(a):
                return _log2(self._shape(a), *self._within(a))
            case ir.Table(values, index):
                return _table(values, self._shape(index), *self._within(index))
        raise AssertionError(f"{type(node).__name__} is resolved by now")

    # min(b + f, c + g) == b + min(f, c - b + g), or one of the two if it is less
    def _pick(self, a: ir.Expr, b: ir.Expr, *, least: bool) -> Shape:
        x, y = self._shape(a), self._shape(b)
        (x_low, x_high), (y_low, y_high) = self._within(a), self._within(b)
        if not least:
            x_low, x_high, y_low, y_high = y_low, y_high, x_low, x_high
        first = x_high <= y_low
        second = (y_high <= x_low) & ~first
        state = np.where(first, 1, np.where(second, 2, 0))
        apart = np.where(first | second, 0, y.base - x.base)
        marks = (*_where(second, -1, x.marks), *_where(first, -1, y.marks))
        return Shape(np.where(second, y.base, x.base), (state, apart, *marks))


# (b + f) // n == b // n + (b % n + f) // n, or one number if no multiple lies within
def _floor_div(a: Shape, low: Any, high: Any, n: int) -> Shape:
    least = low // n
    one = least == high // n
    marks = _where(one, -1, (a.base % n, *a.marks))
    return Shape(np.where(one, least, a.base // n), marks)


# (b + f) % n == b - m + f, with a multiple m of n, if no other one lies within
def _mod(a: Shape, low: Any, high: Any, n: int) -> Shape:
    least = low // n
    one = least == high // n
    base = np.where(one, a.base - least * n, 0)
    return Shape(base, (np.where(one, -1, a.base % n), *a.marks))


def _log2(a: Shape, low: Any, high: Any) -> Shape:
    low, high = floor_log2(low), floor_log2(high)
    one = low == high
    marks = np.where(one, 1, 0), *_where(one, 0, (a.base, *a.marks))
    return Shape(np.where(one, low, 0), marks)


# values[b + f] == values[b] + d f where the entries are d apart
def _table(values: tuple[int, ...], index: Shape, low: Any, high: Any) -> Shape:
    entries, even_to = _even_parts(values)
    first, last = (np.clip(x, 0, len(values) - 1) for x in (low, high))
    one = first == last
    even = (even_to[first] >= last) & (first == low) & (last == high)
    step = entries[np.minimum(first + 1, len(values) - 1)] - entries[first]
    base = entries[first] + np.where(one, 0, (index.base - first) * step)
    marks = np.where(even, 1, 0), np.where(even, step, index.base), *index.marks
    return Shape(np.where(one | even, base, 0), _where(one, -1, marks))


def _where(test: Any, value: int, marks: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(np.where(test, value, mark) for mark in marks)


class _Bits:
    """Packs bool arrays ``[count]`` into as few words as can be."""

    def __init__(self, count: int) -> None:
        self.words: list[np.ndarray] = []
        self._count, self._used = count, WORD

    def add(self, bits: Any) -> None:
        """Appends one bit for each entry."""
        if self._used == WORD:
            self.words.append(np.zeros(self._count, np.int64))
            self._used = 0
        self.words[-1] += np.left_shift(bits, self._used, dtype=np.int64)
        self._used += 1


@lru_cache(maxsize=16)
def _even_parts(values: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The entries, and up to which one the distance to the next stays the same."""
    entries = array_of(values)
    steps = np.diff(entries)
    if not len(steps):
        return entries, np.zeros(1, np.int64)
    ends = np.append(np.flatnonzero(np.diff(steps)), len(steps) - 1)
    even_to = ends[np.searchsorted(ends, np.arange(len(steps)))] + 1
    return entries, np.append(even_to, len(entries) - 1)


def distinct(marks: Sequence[Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` rectangles is the first of its kind, and the kind of each.

    ``marks`` are int arrays ``[count]``, or numbers. Rectangles are of one kind if all
    their marks are equal.
    """
    key, bound = np.zeros(count, np.int64), 1
    for mark in marks:
        mark = np.asarray(mark, np.int64)
        low = int(mark.min())
        width = int(mark.max()) - low + 1
        if width == 1:
            continue
        if bound * width >= MOST:
            kinds, key = np.unique(key, return_inverse=True)
            bound = len(kinds)
        if bound * width >= MOST:
            kinds, mark = np.unique(mark, return_inverse=True)
            low, width = 0, len(kinds)
        key = key * width + (mark - low)
        bound *= width
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    return first, kind
