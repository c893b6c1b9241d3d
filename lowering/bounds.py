"""What a predicate does on whole rectangles of pairs, by intervals and congruences.

Everything is an array with one entry a rectangle, written on an array namespace: NumPy
when planning, jnp at run time. The analysis is sound always, and exact where a
comparison sees each variable once; what it cannot settle, ``planning`` splits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from types import ModuleType
from typing import Any, NamedTuple, assert_never

import numpy as np
from jax import lax

from lowering import ir
from lowering.predicate import floor_log2

# Beyond any sum of positions, and far from overflow when such are added.
ANYTHING = 1 << 40
POWERS_OF_TWO = tuple(1 << i for i in range(42))


class Rectangles(NamedTuple):
    """Inclusive bounds of queries and keys, int arrays with one entry a rectangle."""

    q_min: Any
    q_max: Any
    k_min: Any
    k_max: Any


class Verdict(NamedTuple):
    """What is known of a predicate on each rectangle.

    ``none`` and ``all`` are exact statements about all pairs; ``hit`` says that some
    pair surely holds and ``miss`` that some surely does not. ``hits`` and ``misses``
    say so of every leaf tile inside the rectangle. What is neither is not known.
    """

    none: Any
    all: Any
    hit: Any
    miss: Any
    hits: Any
    misses: Any


class Range(NamedTuple):
    """The values of an expression: within ``low .. high``, all ``≡ low (mod step)``.

    ``tight``: both ends are attained. ``dense``: every such value is attained.
    ``covers``: in any leaf tile it takes at least this many consecutive values.
    """

    low: Any
    high: Any
    step: int
    tight: Any
    dense: Any
    covers: int
    axes: frozenset


@dataclass(frozen=True)
class Analysis:
    """The analysis of rectangles; build one a level and call it on nodes.

    ``leaf`` is the smallest (queries, keys) of a leaf tile. ``operands`` gives the
    range ``(low, high)`` of a run-time array over each rectangle, where known.
    """

    at: Rectangles
    leaf: tuple[int, int] = (1, 1)
    xp: ModuleType = np
    operands: Mapping[ir.Operand, tuple[Any, Any]] | None = None

    def __call__(self, node: ir.Pred) -> Verdict:
        """The verdict on ``node``, whose heads are resolved."""
        match node:
            case ir.Bool(value):
                return self._known(value)
            case ir.Le(a, ir.Const(value)):
                return self._le(a, value)
            case ir.Le(a, b):
                return self._le(ir.Add(a, ir.Mul(b, -1)), 0)
            case ir.Eq(a, ir.Const(value)):
                return self._in(a, (value,))
            case ir.Eq(a, b):
                return self._in(ir.Add(a, ir.Mul(b, -1)), (0,))
            case ir.In(a, values):
                return self._in(a, values)
            case ir.PowerOfTwo(a):
                return self._members(self.range(a), POWERS_OF_TWO)
            case ir.And(terms):
                return reduce(self._and, [self(t) for t in terms])
            case ir.Or(terms):
                inverse = reduce(self._and, [negate(self(t)) for t in terms])
                return negate(inverse)
            case ir.Not(term):
                return negate(self(term))
            case ir.ByHead():
                raise AssertionError("heads are resolved before bounds are taken")
        assert_never(node)

    # --- predicates ---

    def _known(self, value: bool) -> Verdict:
        yes = self.at.q_min == self.at.q_min
        no = ~yes
        return (
            Verdict(no, yes, yes, no, yes, no) if value else negate(self._known(True))
        )

    def _and(self, a: Verdict, b: Verdict) -> Verdict:
        return Verdict(
            none=a.none | b.none,
            all=a.all & b.all,
            hit=(a.all & b.hit) | (b.all & a.hit),
            miss=a.miss | b.miss,
            hits=(a.all & b.hits) | (b.all & a.hits),
            misses=a.misses | b.misses,
        )

    def _le(self, expr: ir.Expr, value: int) -> Verdict:
        r = self.range(expr)
        none, everything = r.low > value, r.high <= value
        hits, misses = everything, none
        cycle = _cycle(expr, r)
        if cycle is not None:
            low, high = cycle
            hits, misses = hits | (low <= value), misses | (high > value)
        hit = (r.tight & ~none) | hits
        miss = (r.tight & ~everything) | misses
        return Verdict(none, everything, hit, miss, hits, misses)

    def _in(self, expr: ir.Expr, values: tuple[int, ...]) -> Verdict:
        if isinstance(expr, ir.Mod) and len(values) == 1:
            return self._congruent(expr, values[0])
        return self._members(self.range(expr), values)

    def _members(self, r: Range, values: tuple[int, ...]) -> Verdict:
        members = self._num_members(r, values)
        found, everything = members > 0, members == (r.high - r.low) // r.step + 1
        hit = everything | (r.dense & found)
        miss = ~found | (r.dense & ~everything)
        if len(values) == 1:  # both ends are attained, and one is not the value
            miss = miss | (r.tight & (r.low != r.high))
        return Verdict(~found, everything, hit, miss, everything, ~found)

    def _num_members(self, r: Range, values: tuple[int, ...]) -> Any:
        """How many of ``values`` lie in the range, at its residue."""
        array = np.asarray(values, np.int64)
        total = r.low * 0
        for residue in np.unique(array % r.step):
            same = array[array % r.step == residue]
            inside = _count(self.xp, same, r.low, r.high)
            total = total + self.xp.where(r.low % r.step == residue, inside, 0)
        return total

    def _congruent(self, expr: ir.Mod, residue: int) -> Verdict:
        """``inner % divisor == residue``: exact where ``inner`` has no gaps."""
        inner, divisor = self.range(expr.expr), expr.divisor
        if inner.step != 1:
            return self._members(self.range(expr), (residue,))
        first = inner.low + (residue - inner.low) % divisor
        found = first <= inner.high
        everything = (first == inner.low) & ((inner.low == inner.high) | (divisor == 1))
        periodic = inner.covers >= divisor
        hits = everything | (found & periodic)
        misses = ~found | ((inner.covers > 1) & (divisor > 1) & ~everything)
        return Verdict(
            ~found,
            everything,
            (inner.dense & found) | everything | hits,
            ~found | (inner.dense & ~everything) | misses,
            hits,
            misses,
        )

    # --- expressions ---

    def range(self, node: ir.Expr) -> Range:
        """The range of ``node`` on every rectangle."""
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
                return self._add(self.range(a), self.range(b))
            case ir.Mul(a, n):
                return self._mul(self.range(a), n)
            case ir.FloorDiv(a, n):
                return self._floor_div(self.range(a), n)
            case ir.Mod(a, n):
                return self._mod(self.range(a), n)
            case ir.Min(a, b):
                return self._pick(self.xp.minimum, self.range(a), self.range(b))
            case ir.Max(a, b):
                return self._pick(self.xp.maximum, self.range(a), self.range(b))
            case ir.Log2(a):
                return self._log2(self.range(a))
            case ir.Within(a, _):
                return self.range(a)
            case ir.Table(values, index):
                return self._table(values, self.range(index))
            case ir.Operand():
                return self._operand(node)
            case ir.Hoisted():
                raise AssertionError("bounds are taken before vectors are hoisted")
        assert_never(node)

    def _position(self, low: Any, high: Any, covers: int, axis: str) -> Range:
        return Range(low, high, 1, True, True, covers, frozenset({axis}))

    def _add(self, a: Range, b: Range) -> Range:
        low, high = a.low + b.low, a.high + b.high
        if a.axes & b.axes:  # what they share may not take both ends at once
            step = int(np.gcd(a.step, b.step))
            still_a, still_b = a.low == a.high, b.low == b.high
            tight = (still_a & b.tight) | (still_b & a.tight)
            dense = still_a & still_b
            if b.step == step:
                dense = dense | (still_a & b.dense)
            if a.step == step:
                dense = dense | (still_b & a.dense)
            return Range(low, high, step, tight, dense, 1, a.axes | b.axes)
        step, wide = sorted((a.step, b.step))
        fine, coarse = (a, b) if a.step <= b.step else (b, a)
        # Copies of the finer range, ``wide`` apart, leave no gap if it is long enough.
        fills = (fine.high - fine.low + step >= wide) | (coarse.low == coarse.high)
        divides = wide % step == 0
        constant = not fine.axes or not coarse.axes
        if constant:
            moving = a if a.axes else b
            step, dense = moving.step, a.dense & b.dense
            covers = moving.covers
        else:
            step = int(np.gcd(step, wide))
            dense = a.dense & b.dense & divides & fills
            covers = a.covers + b.covers - 1 if a.step == b.step == 1 else 1
        return Range(low, high, step, a.tight & b.tight, dense, covers, a.axes | b.axes)

    def _mul(self, a: Range, n: int) -> Range:
        low, high = (a.low * n, a.high * n) if n >= 0 else (a.high * n, a.low * n)
        covers = a.covers if abs(n) == 1 else 1
        return a._replace(
            low=low, high=high, step=max(a.step * abs(n), 1), covers=covers
        )

    def _floor_div(self, a: Range, n: int) -> Range:
        low, high = a.low // n, a.high // n
        step = a.step // n if a.step % n == 0 else 1
        close = a.step % n == 0 or a.step <= n
        dense = a.dense & (close | (low == high))
        covers = -(-a.covers // n) if a.step == 1 else 1
        return a._replace(low=low, high=high, step=step, dense=dense, covers=covers)

    def _mod(self, a: Range, n: int) -> Range:
        same = (a.low // n) == (a.high // n)
        step = int(np.gcd(a.step, n))
        least = a.low % step
        low = self.xp.where(same, a.low % n, least)
        high = self.xp.where(same, a.high % n, n - step + least)
        # Values a.step apart reach every residue that they can within n / step of them.
        wraps = a.high - a.low + a.step >= (n // step) * a.step
        keeps_step = a.step == step
        dense = a.dense & (wraps | (same & (keeps_step | (a.low == a.high))))
        tight = a.dense & wraps | (same & a.tight)
        covers = n if a.covers >= n else 1
        return Range(low, high, step, tight, dense, covers, a.axes)

    def _pick(self, pick: Any, a: Range, b: Range) -> Range:
        low, high = pick(a.low, b.low), pick(a.high, b.high)
        # One of them is the answer throughout, or the ends come from free variables.
        apart = (a.high <= b.low) | (b.high <= a.low)
        free = not (a.axes & b.axes)
        tight = a.tight & b.tight & (apart | free)
        step = a.step if a.step == b.step == 1 else 1
        dense = a.dense & b.dense & (a.step == 1) & (b.step == 1)
        dense = (dense & (apart | free)) | (tight & (low == high))
        return Range(low, high, step, tight, dense, 1, a.axes | b.axes)

    def _log2(self, a: Range) -> Range:
        low, high = (self._floor_log2(x) for x in (a.low, a.high))
        dense = a.dense & ((a.step == 1) | (low == high))
        return Range(low, high, 1, a.tight, dense, 1, a.axes)

    def _floor_log2(self, x: Any) -> Any:
        if self.xp is np:
            return floor_log2(x)
        return 31 - lax.clz(self.xp.maximum(x, 1))

    def _table(self, values: tuple[int, ...], index: Range) -> Range:
        low, high = _table_bounds(self.xp, values, index.low, index.high)
        tight = index.dense & (index.step == 1)
        dense = (low == high) | (tight & (high - low <= 1))
        return Range(low, high, 1, tight, dense, 1, index.axes)

    def _operand(self, node: ir.Operand) -> Range:
        axes = ir.axes(node) or frozenset({node.name})
        if self.operands is None or node not in self.operands:
            at = self.at.q_min * 0
            return Range(at - ANYTHING, at + ANYTHING, 1, False, False, 1, axes)
        low, high = self.operands[node]
        return Range(low, high, 1, True, (high - low) <= 1, 1, axes)


def negate(v: Verdict) -> Verdict:
    """The verdict on the negation."""
    return Verdict(v.all, v.none, v.miss, v.hit, v.misses, v.hits)


def _cycle(expr: ir.Expr, r: Range) -> tuple[int, int] | None:
    """The values that a residue surely takes in every leaf tile, if all of them."""
    match expr:
        case ir.Mod(_, n) if r.covers >= n:
            return 0, n - 1
        case ir.Mul(ir.Mod(_, n), -1) if r.covers >= n:
            return 1 - n, 0
    return None


def _count(xp: ModuleType, members: np.ndarray, low: Any, high: Any) -> Any:
    """How many of the ascending ``members`` lie in ``low .. high``."""
    sorted_members = xp.asarray(members)
    above = xp.searchsorted(sorted_members, high, side="right")
    return above - xp.searchsorted(sorted_members, low, side="left")


@lru_cache(maxsize=64)
def _sparse_table(values: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Minima and maxima over every power of two of entries, ``[levels, entries]``."""
    low = [np.asarray(values, np.int64)]
    high = [low[0]]
    width = 1
    while 2 * width <= len(values):
        for rows, pick in ((low, np.minimum), (high, np.maximum)):
            row = rows[-1].copy()
            row[:-width] = pick(row[:-width], rows[-1][width:])
            rows.append(row)
        width *= 2
    return np.stack(low), np.stack(high)


def _table_bounds(
    xp: ModuleType, values: tuple[int, ...], first: Any, last: Any
) -> tuple[Any, Any]:
    """The least and greatest of ``values[first .. last]``, in two look-ups each."""
    low, high = (xp.asarray(t) for t in _sparse_table(values))
    first = xp.clip(first, 0, len(values) - 1)
    last = xp.clip(last, 0, len(values) - 1)
    floor_log2 = xp.asarray(np.frexp(np.arange(1, len(values) + 1))[1] - 1)
    level = floor_log2[last - first]
    other = last - 2**level + 1
    return (
        xp.minimum(low[level, first], low[level, other]),
        xp.maximum(high[level, first], high[level, other]),
    )
