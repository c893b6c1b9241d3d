"""Decides on rectangles of pairs whether a predicate holds for all, some or no pairs.

The analysis uses intervals and congruences. It is always sound, and exact where a
comparison reads each variable once. ``planning`` splits the rectangles that it cannot
decide. Each rule below has its formula above it; ``[l, h]`` is a range.
"""

from dataclasses import dataclass, field
from functools import lru_cache, reduce
from operator import and_, or_
from typing import Any, NamedTuple, assert_never

import numpy as np

from lowering import ir
from lowering.ranges.digit_reads import Read, Reads
from lowering.ranges.entries import around, held
from lowering.ranges.ranges import Range, Ranges, Rectangles, integers

POWERS_OF_TWO = tuple(1 << i for i in range(42))
# If rectangles look up at most so many entries of a table, each entry is tried.
FEW_ENTRIES = 8


class Verdict(NamedTuple):
    """What is known of a predicate on each rectangle: bool arrays ``[rectangles]``.

    ``none``: it holds for no pair. ``all``: it holds for all pairs. ``hit``: it surely
    holds for some pair. ``miss``: it surely fails for some pair. ``hits`` and
    ``misses``: the same for every leaf tile inside the rectangle. False means unknown.
    ``reads`` are the positions and digits that the predicate depends on. Of rough
    ranges, ``none`` and ``all`` alone are wanted, and the others say nothing.
    """

    none: Any
    all: Any
    hit: Any
    miss: Any
    hits: Any
    misses: Any
    reads: Reads


@dataclass(frozen=True)
class Analysis:
    """Computes verdicts on rectangles: one object a level, called on predicates."""

    ranges: Ranges
    # The predicates seen so far: maps of several heads have many parts in common.
    seen: dict[ir.Pred, Verdict] = field(default_factory=dict, compare=False)

    @property
    def at(self) -> Rectangles:
        """The rectangles."""
        return self.ranges.at

    def __call__(self, node: ir.Pred) -> Verdict:
        """The verdict on ``node``, whose heads are resolved."""
        found = self.seen.get(node)
        if found is None:
            found = self.seen[node] = self._verdict(node)
        return found

    def _verdict(self, node: ir.Pred) -> Verdict:
        table = _table_of(node)
        if table is not None and self.ranges.xp is np:
            found = self._by_value(node, table)
            if found is not None:
                return found
            if self._is_narrow(table):
                return self._by_entry(node, table)
        match node:
            case ir.Bool(value):
                return self._known(value)
            case ir.Le(a, ir.Const(value)):
                return self._le(a, value)
            case ir.Le(a, b):
                return self._ordered(self.ranges(a), self.ranges(b))
            case ir.Eq(a, ir.Const(value)):
                return self._in(a, (value,))
            case ir.Eq(a, b):
                return self._equal(self.ranges(a), self.ranges(b))
            case ir.In(a, values):
                return self._in(a, values)
            case ir.PowerOfTwo(a):
                return self._members(self.ranges(a), POWERS_OF_TWO)
            case ir.And(terms):
                return self._every([self(t) for t in terms])
            case ir.Or(terms):
                return negate(self._every([negate(self(t)) for t in terms]))
            case ir.Not(term):
                return negate(self(term))
            case ir.HoistedBits():
                return self._bits(node)
            case ir.ByHead():
                raise AssertionError("heads are resolved before bounds are taken")
        assert_never(node)

    # --- predicates ---

    def _known(self, value: bool) -> Verdict:
        yes = self.at.q_min == self.at.q_min
        no = ~yes
        return (
            Verdict(no, yes, yes, no, yes, no, frozenset())
            if value
            else negate(self._known(True))
        )

    def _bits(self, node: ir.HoistedBits) -> Verdict:
        assert self.ranges.operands is not None
        some, every = self.ranges.operands[node]
        reads = frozenset({Read("q"), Read("k")})
        return Verdict(~some, every, every, ~some, every, ~some, reads)

    def _every(self, verdicts: list[Verdict]) -> Verdict:
        """The verdict on a conjunction.

        Verdicts that read the same digits are joined first, and those that read few
        come first, so that ``_and`` finds independent operands more often.
        """
        groups: dict[Reads, list[Verdict]] = {}
        for verdict in sorted(verdicts, key=lambda v: len(v.reads)):
            groups.setdefault(verdict.reads, []).append(verdict)
        return reduce(self._and, [reduce(self._and, g) for g in groups.values()])

    # none(A & B) if none(A) or none(B);  all(A & B) if all(A) and all(B)
    # hit(A & B)  if all(A) and hit(B), or if A and B are independent and both hit
    def _and(self, a: Verdict, b: Verdict) -> Verdict:
        if self.ranges.rough:
            return _only(a.none | b.none, a.all & b.all)
        hit = (a.all & b.hit) | (b.all & a.hit)
        hits = (a.all & b.hits) | (b.all & a.hits)
        free = self.ranges.free(a.reads, b.reads)
        if free is not False:  # independent: some pair fulfils both
            hit = hit | (free & a.hit & b.hit)
        if free is True:
            hits = a.hits & b.hits
        return Verdict(
            none=a.none | b.none,
            all=a.all & b.all,
            hit=hit,
            miss=a.miss | b.miss,
            hits=hits,
            misses=a.misses | b.misses,
            reads=a.reads | b.reads,
        )

    def _is_narrow(self, table: ir.Table) -> bool:
        """Whether rectangles look up few entries, and this table is not being tried."""
        return table not in self.ranges.seen and self._width(table) <= FEW_ENTRIES

    def _width(self, table: ir.Table) -> int:
        """The most entries that any rectangle looks up."""
        index = self.ranges(table.index)
        return 1 + int(np.max(index.high - index.low, initial=0))

    # table == t in [l, h]: none if no entry that is looked up lies within
    def _by_value(self, node: ir.Pred, table: ir.Table) -> Verdict | None:
        """The verdict on a sum with the table that takes one of a few values, or None.

        The rest of the sum does not depend on the axes of the index.
        """
        member = _membership(node)
        split = member and around(member[0], table)
        if not member or not split or abs(split[0]) != 1:
            return None
        (expr, values), (factor, rest) = member, split
        verdict, other = self._in(expr, values), self.ranges(rest)
        index = self.ranges(table.index)
        last = len(table.values) - 1
        first, last = (np.clip(x, 0, last) for x in (index.low, index.high))
        sure = index.dense & (index.step == 1) & other.dense & (other.step == 1)
        some = hit = np.zeros(np.shape(self.at.q_min), bool)
        for value in values:
            ends = factor * (value - other.low), factor * (value - other.high)
            low, high = ends if factor < 0 else ends[::-1]
            found = held(table.values, first, last, low, high)
            some, hit = some | found.some, hit | (found.some & found.exact)
        none = verdict.none | ~some
        return verdict._replace(
            none=none,
            hit=verdict.hit | (sure & hit),
            miss=verdict.miss | none,
            misses=verdict.misses | none,
        )

    def _by_entry(self, node: ir.Pred, table: ir.Table) -> Verdict:
        """Joins the verdicts for each entry that the index may take.

        The other parts of the comparison do not depend on the axes of the index.
        """
        index = self.ranges(table.index)
        found = [
            Analysis(
                self.ranges.with_entry(table, np.minimum(index.low + i, index.high))
            )(node)
            for i in range(self._width(table))
        ]
        none, every = (reduce(and_, [v[i] for v in found]) for i in (0, 1))
        # An entry surely occurs only where the index takes every value of its range.
        sure = index.dense & (index.step == 1)
        hit = sure & reduce(or_, [v.hit for v in found])
        miss = sure & reduce(or_, [v.miss for v in found])
        reads = found[0].reads | index.reads
        return Verdict(none, every, hit | every, miss | none, every, none, reads)

    # [l, h] <= c: none if l > c, all if h <= c; between, an attained end decides
    def _le(self, expr: ir.Expr, value: int) -> Verdict:
        r = self.ranges(expr)
        none, everything = r.low > value, r.high <= value
        if self.ranges.rough:
            return _only(none, everything)
        hits, misses = everything, none
        cycle = _cycle(expr, r)
        if cycle is not None:
            low, high = cycle
            hits, misses = hits | (low <= value), misses | (high > value)
        hit = (r.tight & ~none) | hits
        miss = (r.tight & ~everything) | misses
        return Verdict(none, everything, hit, miss, hits, misses, r.reads)

    # [l, h] <= [m, i]: none if l > i, all if h <= m
    def _ordered(self, a: Range, b: Range) -> Verdict:
        """``a <= b`` without computing ``a - b``, which may exceed 32 bits."""
        none, everything = a.low > b.high, a.high <= b.low
        ends = self.ranges.free(a.reads, b.reads) & a.tight & b.tight
        hit, miss = everything | (ends & ~none), none | (ends & ~everything)
        return Verdict(none, everything, hit, miss, everything, none, a.reads | b.reads)

    # [l, h] == [m, i]: none if they are disjoint, all if l == h == m == i
    def _equal(self, a: Range, b: Range) -> Verdict:
        """``a == b`` without computing ``a - b``, which may exceed 32 bits."""
        none = (a.low > b.high) | (b.low > a.high)
        everything = (a.low == b.high) & (b.low == a.high)
        reads = a.reads | b.reads
        return Verdict(none, everything, everything, none, everything, none, reads)

    def _in(self, expr: ir.Expr, values: tuple[int, ...]) -> Verdict:
        if isinstance(expr, ir.Mod) and len(values) == 1:
            return self._congruent(expr, values[0])
        return self._members(self.ranges(expr), values)

    # [l, h] in S: none if S has no value of the range, all if S has all of them
    def _members(self, r: Range, values: tuple[int, ...]) -> Verdict:
        members = self._num_members(r, values)
        # At run time h - l may overflow 32 bits, and the width be less than 1.
        found = members > 0
        everything = found & (members == (r.high - r.low) // r.step + 1)
        if self.ranges.rough:
            return _only(~found, everything)
        hit = everything | (r.dense & found)
        miss = ~found | (r.dense & ~everything)
        if len(values) == 1:  # both ends are attained, and at most one is the value
            miss = miss | (r.tight & (r.low != r.high))
        return Verdict(~found, everything, hit, miss, everything, ~found, r.reads)

    def _num_members(self, r: Range, values: tuple[int, ...]) -> Any:
        """How many of ``values`` lie in the range and are ``≡ low (mod step)``."""
        array = np.asarray(values, np.int64)
        total = r.low * 0
        for residue in np.unique(array % r.step):
            same = array[array % r.step == residue]
            inside = _count(self.ranges.xp, same, r.low, r.high)
            mine = r.low % r.step == int(residue)
            total = total + self.ranges.xp.where(mine, inside, 0)
        return total

    # [l, h] % n == r: the least such value is first = l + (r - l) % n; none if > h
    def _congruent(self, expr: ir.Mod, residue: int) -> Verdict:
        """``inner % divisor == residue``: exact where ``inner`` has no gaps."""
        inner, divisor = self.ranges(expr.expr), expr.divisor
        if inner.step != 1:
            return self._members(self.ranges(expr), (residue,))
        first = inner.low + (residue - inner.low) % divisor
        found = first <= inner.high
        everything = (first == inner.low) & ((inner.low == inner.high) | (divisor == 1))
        if self.ranges.rough:
            return _only(~found, everything)
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
            inner.reads,
        )


def _only(none: Any, every: Any) -> Verdict:
    """What rough ranges tell."""
    return Verdict(none, every, False, False, False, False, frozenset())


def negate(v: Verdict) -> Verdict:
    """The verdict on the negation."""
    return Verdict(v.all, v.none, v.miss, v.hit, v.misses, v.hits, v.reads)


@lru_cache(maxsize=4096)
def _membership(node: ir.Pred) -> tuple[ir.Expr, tuple[int, ...]] | None:
    """The expression and the few values of which it has to take one, or None."""
    match node:
        case ir.Eq(a, ir.Const(value)):
            return a, (value,)
        case ir.Eq(a, b):
            return ir.Add(a, ir.Mul(b, -1)), (0,)
        case ir.In(a, values) if len(values) <= FEW_ENTRIES:
            return a, tuple(values)
    return None


@lru_cache(maxsize=4096)
def _table_of(node: ir.Pred) -> ir.Table | None:
    """The one table of a comparison whose other parts read other axes, or None."""
    if not isinstance(node, ir.Le | ir.Eq | ir.In):
        return None
    tables = {n for n in ir.walk(node) if isinstance(n, ir.Table)}
    if len(tables) != 1:
        return None
    (table,) = tables
    # Not `ir.replace`: a long table is slow to hash, and quick to compare with itself.
    others = ir.rewrite(node, lambda part: ir.Const(0) if part == table else None)
    return None if ir.axes(others) & ir.axes(table) else table


def _cycle(expr: ir.Expr, r: Range) -> tuple[int, int] | None:
    """Least and greatest residue, if it takes all values in every leaf tile."""
    match expr:
        case ir.Mod(_, n) if r.covers >= n:
            return 0, n - 1
        case ir.Mul(ir.Mod(_, n), -1) if r.covers >= n:
            return 1 - n, 0
    return None


def _count(xp: Any, members: np.ndarray, low: Any, high: Any) -> Any:
    """How many of the ascending ``members`` lie in ``low .. high``."""
    sorted_members = integers(xp, members)
    above = xp.searchsorted(sorted_members, high, side="right")
    return above - xp.searchsorted(sorted_members, low, side="left")
