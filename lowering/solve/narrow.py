"""Rewrites comparisons that exceed 32 bits so that a kernel can test them exactly.

One side of such a comparison is computed outside of the kernel, in 64 bits, and clipped
to the interval in which the result changes. A comparison that no rule covers stays as
it is; ``hoist`` makes bits of it, which are computed outside. Each rule below has its
formula above it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import assert_never

from lowering import ir
from lowering.expr.evaluate import intervals
from lowering.expr.fits import bounded, ends, fits, is_plain, looks_up_pairs
from lowering.expr.simplify import integer, simplify
from lowering.expr.static_range import Known
from lowering.solve.solve import from_linear, linear, log2_le, minus

# A set beyond 32 bits is split into at most so many intervals.
MOST_INTERVALS = 16


def narrow(node: ir.Pred, known: Known) -> ir.Pred:
    """An equal predicate whose comparisons fit 32 bits where a rule allows it.

    ``node`` is in normal form.
    """

    def rule(part: ir.Pred) -> ir.Pred | None:
        if is_plain(part, known):
            return part
        match part:
            case ir.And(terms) | ir.Or(terms):
                return _joined(type(part), [narrow(term, known) for term in terms])
            case ir.ByHead() | ir.Not():
                return None
            case ir.Bool() | ir.HoistedBits():
                return part
            case ir.Le() | ir.Eq() | ir.In() | ir.PowerOfTwo():
                if fits(part, known) or looks_up_pairs(part):
                    return part
                found = _Comparison(known)(part)
                return part if found is None or not fits(found, known) else found
        assert_never(part)

    return ir.rewrite(node, rule)


def _joined(kind: type[ir.And] | type[ir.Or], terms: list[ir.Pred]) -> ir.Pred:
    """The terms as one node, flattened and without repeats."""
    flat = [t.terms if isinstance(t, kind) else (t,) for t in terms]
    found = tuple(dict.fromkeys(x for part in flat for x in part))
    return found[0] if len(found) == 1 else kind(found)


@dataclass(frozen=True)
class _Comparison:
    """Rewrites one comparison in normal form; None where no rule covers it."""

    known: Known

    def __call__(self, node: ir.Pred) -> ir.Pred | None:
        match bounded(node, self.known):
            case ir.Le(a, ir.Const(value)):
                return self.le(a, value)
            case ir.Eq(a, ir.Const(value)):
                return self.eq(a, value)
            case ir.In(a, values):
                return self.one_of(a, values)
            case ir.And(terms) | ir.Or(terms) as both:
                return self.each(type(both), terms)
            case ir.Bool() as truth:
                return truth
        return None

    def each(
        self, kind: type[ir.And] | type[ir.Or], terms: tuple[ir.Pred, ...]
    ) -> ir.Pred | None:
        """The terms rewritten and joined, or None if one cannot be rewritten."""
        found = [t if fits(t, self.known) else self(t) for t in terms]
        new = [t for t in found if t is not None]
        return _joined(kind, new) if len(new) == len(found) else None

    def both(self, kind: type[ir.And] | type[ir.Or], *terms: ir.Pred) -> ir.Pred | None:
        """``each`` for terms that are not in normal form yet."""
        return self.each(kind, tuple(simplify(term) for term in terms))

    # --- a <= value ---

    def le(self, a: ir.Expr, value: int) -> ir.Pred | None:
        a = self.reduced(a)
        if fits(whole := ir.Le(a, ir.Const(value)), self.known):
            return whole
        return (
            _cheapest(self.le_by_sides(a, value))
            or self.le_by_parts(a, value)
            or self.le_in_two(a, value)
        )

    def le_by_sides(self, a: ir.Expr, value: int) -> Iterator[tuple[int, ir.Pred]]:
        """Comparisons of two sides that fit, each with its cost.

        left <= right  iff  not (right + 1 <= left)  iff  not (right <= left - 1)
        """
        one = ir.Const(1)
        for left, right in self.sides(a, value):
            for at_least, (x, y) in (
                (False, (left, right)),
                (True, (integer(ir.Add(right, one)), left)),
                (True, (right, minus(left, one))),
            ):
                node = self.ordered(x, y)
                if node is not None:
                    cost = 2 * _minuses(x, y) + at_least
                    yield cost, ir.Not(node) if at_least else node

    # For left in low .. high:   left <= right  iff  left <= clip(right, low - 1, high)
    # For right in low .. high:  left <= right  iff  clip(left, low, high + 1) <= right
    def ordered(self, left: ir.Expr, right: ir.Expr) -> ir.Pred | None:
        """``left <= right`` with the side that does not fit clipped, or None."""
        if fits(left, self.known):
            low, high = ends(left, self.known)
            right = self.clipped(right, low - 1, high)
        elif fits(right, self.known):
            low, high = ends(right, self.known)
            left = self.clipped(left, low, high + 1)
        node = ir.Le(left, right)
        return node if fits(node, self.known) else None

    # min(x, y) + r <= c  iff  x + r <= c | y + r <= c
    # max(x, y) + r <= c  iff  x + r <= c & y + r <= c  (a negative factor swaps them)
    def le_by_parts(self, a: ir.Expr, value: int) -> ir.Pred | None:
        """``a <= value`` by the parts of a minimum, a maximum or a logarithm."""
        terms, _ = linear(a)
        for atom, f in terms.items():
            match atom:
                case ir.Min(x, y) | ir.Max(x, y):
                    kind = ir.And if (f > 0) == isinstance(atom, ir.Max) else ir.Or
                    rest = minus(a, ir.Mul(atom, f))
                    parts = (ir.Add(rest, ir.Mul(part, f)) for part in (x, y))
                    bound = ir.Const(value)
                    return self.both(kind, *(ir.Le(part, bound) for part in parts))
                case ir.Log2(x) if len(terms) == 1:
                    return self.both(ir.And, log2_le(x, f, value))
        return None

    # For left in low .. high:
    #   left <= right  iff  left <= clip(right, low, high) & -right <= -low
    # For right in low .. high:
    #   left <= right  iff  clip(left, low, high) <= right & left <= high
    def le_in_two(self, a: ir.Expr, value: int) -> ir.Pred | None:
        """``a <= value`` as two comparisons, where one side exceeds both ends."""
        for left, right in self.sides(a, value):
            if fits(left, self.known):
                low, high = ends(left, self.known)
                near = ir.Le(left, self.clipped(right, low, high))
                return self.both_fit(near, self.le(integer(ir.Mul(right, -1)), -low))
            if fits(right, self.known):
                low, high = ends(right, self.known)
                near = ir.Le(self.clipped(left, low, high), right)
                return self.both_fit(near, self.le(left, high))
        return None

    def both_fit(self, a: ir.Pred, b: ir.Pred | None) -> ir.Pred | None:
        """``a & b``, or None if a kernel cannot compute both."""
        if b is None or not fits(a, self.known):
            return None
        return ir.And((a, b))

    # --- a == value, a in values ---

    # For left in low .. high:
    #   left == right  iff  left == clip(right, low - 1, high + 1)
    # else  a == c  iff  a <= c & c <= a
    def eq(self, a: ir.Expr, value: int) -> ir.Pred | None:
        reduced = self.reduced(a)
        if fits(whole := ir.Eq(reduced, ir.Const(value)), self.known):
            return whole
        low, high = ir.Le(a, ir.Const(value)), ir.Le(ir.Const(value), a)
        return _cheapest(self.eq_by_sides(reduced, value)) or self.both(
            ir.And, low, high
        )

    def eq_by_sides(self, a: ir.Expr, value: int) -> Iterator[tuple[int, ir.Pred]]:
        """Equations of two sides that fit, each with its cost."""
        for left, right in self.sides(a, value):
            if fits(left, self.known):
                low, high = ends(left, self.known)
                node = ir.Eq(left, self.clipped(right, low - 1, high + 1))
                if fits(node, self.known):
                    yield _minuses(left, right), node

    # For rest in low .. high:  x + rest in S  iff
    #   clip(x, min(S) - high - 1, max(S) - low + 1) + rest in S
    # else  a in {lo .. hi, ...}  iff  lo <= a & a <= hi | ...
    def one_of(self, a: ir.Expr, values: tuple[int, ...]) -> ir.Pred | None:
        a = self.reduced(a)
        if fits(whole := ir.In(a, values), self.known):
            return whole
        for side, rest in self.split(a):
            low, high = ends(rest, self.known)
            clipped = self.clipped(side, values[0] - high - 1, values[-1] - low + 1)
            node = ir.In(integer(ir.Add(clipped, rest)), values)
            if fits(node, self.known):
                return node
        found = intervals(values)
        if len(found) > MOST_INTERVALS:
            return None
        parts = [
            ir.And((ir.Le(ir.Const(low), a), ir.Le(a, ir.Const(high))))
            for low, high in found
        ]
        return self.both(ir.Or, *parts)

    # --- the two sides of a comparison ---

    def split(self, a: ir.Expr) -> Iterator[tuple[ir.Expr, ir.Expr]]:
        """Splits a sum into the terms of one side, ``q`` or ``k``, and the rest."""
        terms, constant = linear(a)
        axes = {atom: ir.axes(atom) - {"h"} for atom in terms}
        # Terms without a position go with either side.
        for side in ("q", "k") if any(axes.values()) else ("q",):
            mine = {x: f for x, f in terms.items() if axes[x] <= {side}}
            others = {x: f for x, f in terms.items() if x not in mine}
            if any(axes[x] for x in mine) or not others:
                yield from_linear(mine, 0), from_linear(others, constant)

    def sides(self, a: ir.Expr, value: int) -> Iterator[tuple[ir.Expr, ir.Expr]]:
        """Expressions ``(left, right)`` with ``left <= right`` iff ``a <= value``."""
        bound, zero = ir.Const(value), ir.Const(0)
        for x, rest in self.split(a):
            # Added terms stay on the left, subtracted ones move: it reads best.
            parts = (x, rest) if not _minuses(x) else (rest, x)
            for one, other in (parts, parts[::-1]):
                yield one, minus(bound, other)
                yield minus(one, bound), minus(zero, other)

    def clipped(self, a: ir.Expr, low: int, high: int) -> ir.Expr:
        """``a`` clipped to ``low .. high`` if it may exceed 32 bits."""
        if fits(a, self.known):
            return a
        least, most = ends(a, self.known)
        if least < low:
            a = ir.Max(a, ir.Const(low))
        return ir.Min(a, ir.Const(high)) if most > high else a

    def reduced(self, a: ir.Expr) -> ir.Expr:
        """An equal sum whose quotients and remainders fit, if possible."""
        terms, constant = linear(a)
        if all(fits(atom, self.known) for atom in terms):
            return a
        total: ir.Expr = ir.Const(constant)
        for atom, f in terms.items():
            total = ir.Add(total, ir.Mul(self.reduced_atom(atom), f))
        return integer(total)

    def reduced_atom(self, atom: ir.Expr) -> ir.Expr:
        match atom:
            case ir.Mod(x, n) if not fits(atom, self.known):
                # (a + b) % n == (a % n + b) % n
                x = self.reduced(x)
                for side, _ in self.split(x):
                    x = ir.Add(minus(x, side), integer(ir.Mod(side, n)))
                return ir.Mod(integer(x), n)
            case ir.FloorDiv(x, n) if not fits(atom, self.known):
                # (a + b) // n == a // n + (a % n + b) // n
                x = self.reduced(x)
                whole: ir.Expr = ir.Const(0)
                for side, _ in self.split(x):
                    whole = ir.Add(whole, ir.FloorDiv(side, n))
                    x = ir.Add(minus(x, side), integer(ir.Mod(side, n)))
                return ir.Add(whole, ir.FloorDiv(integer(x), n))
        return atom


def _cheapest(found: Iterable[tuple[int, ir.Pred]]) -> ir.Pred | None:
    """The first node that costs nothing, else the first of those that cost least."""
    best: tuple[int, ir.Pred] | None = None
    for cost, node in found:
        if not cost:
            return node
        if best is None or cost < best[0]:
            best = cost, node
    return None if best is None else best[1]


def _minuses(*nodes: ir.Expr) -> int:
    """How many terms are subtracted: the cost of a comparison for a reader."""
    return sum(f < 0 for node in nodes for f in linear(node)[0].values())
