"""Finds the digits of positions that a map reads, and rewrites the map in digits.

``q % 8``, ``(q - k) % 8`` and ``k // 64 % 4`` read digits of a position in a mixed
radix: strides, rows and columns, tiles. ``read_sides`` collects the radices from the
expressions. ``in_digits`` writes a map in placeholders for digits, and ``in_slots`` in
the slots of a layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import gcd, prod

from lowering import ir
from lowering.expr.simplify import integer, simplify, sum_of
from lowering.order.layout import Axis, Layout, places


@dataclass(frozen=True)
class Side:
    """The positions of the queries or of the keys, as axes of digits."""

    name: ir.Side
    length: int
    axes: tuple[Axis, ...]

    @property
    def radices(self) -> tuple[int, ...]:
        """The radices of all digits."""
        return tuple(r for axis in self.axes for r in axis.radices)


def read_sides(
    maps: tuple[ir.Pred, ...], q_seq_len: int, kv_seq_len: int
) -> tuple[Side, Side]:
    """The digits that the maps read; equal lengths get equal digits on both sides."""
    alike = q_seq_len == kv_seq_len

    def whole(name: ir.Side, length: int) -> Side:
        found = _periods(maps, (ir.Q, ir.K) if alike else (ir.Var(name),))
        axes = tuple(Axis(size, (size,)) for size in _radices(found, length))
        return Side(name, length, axes)

    sides = whole("q", q_seq_len), whole("k", kv_seq_len)
    flat = [_in_coordinates(node, sides) for node in maps]

    def split(side: Side) -> Side:
        axes = []
        for i, axis in enumerate(side.axes):
            same = sides if alike else (side,)
            found = _periods(flat, tuple(_coordinate(s, i) for s in same))
            axes.append(Axis(axis.size, _radices(found, axis.size)))
        return Side(side.name, side.length, tuple(axes))

    return split(sides[0]), split(sides[1])


def in_digits(node: ir.Pred, sides: Sequence[Side]) -> ir.Pred:
    """The map in ``digit(side, i, radix)``; slots without a position select nothing."""
    flat = _in_coordinates(ir.And((node, *(_exists(s) for s in sides))), sides)
    sums = _digit_sums(sides)
    inside = [
        ir.Le(sums[_coordinate(side, i)], ir.Const(axis.size - 1))
        for side in sides
        for i, axis in enumerate(side.axes)
        if axis.padded > axis.size
    ]
    return simplify(ir.And((ir.replace(flat, sums), *inside)))


def digit(name: ir.Side, i: int, radix: int) -> ir.Expr:
    """The placeholder of a digit: a remainder, so that ``simplify`` knows its range."""
    return ir.Mod(ir.Hoisted(name, i), radix)


def in_slots(node: ir.Pred, q: Layout, kv: Layout) -> ir.Pred:
    """The map on slots of layouts; slots without a position select nothing."""
    sides = Side("q", q.length, q.axes), Side("k", kv.length, kv.axes)
    written = in_digits(node, sides)
    new: dict[ir.Node, ir.Expr] = {}
    for side, layout in zip(sides, (q, kv), strict=True):
        digits = layout.digits(ir.Var(side.name))
        for i, radix in enumerate(side.radices):
            new[digit(side.name, i, radix)] = digits[i]
    return simplify(ir.replace(written, new))


def _in_coordinates(node: ir.Pred, sides: Sequence[Side]) -> ir.Pred:
    """The map with one placeholder for each coordinate of the axes."""
    new: dict[ir.Axis, ir.Expr] = {}
    for side in sides:
        values = places(tuple(axis.size for axis in side.axes))
        terms = [ir.Mul(_coordinate(side, i), place) for i, place in enumerate(values)]
        new[side.name] = integer(reduce(ir.Add, terms))
    return simplify(ir.substitute(node, new))


def _coordinate(side: Side, i: int) -> ir.Expr:
    return ir.Mod(ir.Hoisted(side.name, i), side.axes[i].size)


def _digit_sums(sides: Sequence[Side]) -> dict[ir.Node, ir.Expr]:
    """Every coordinate as the sum of its digits."""
    found: dict[ir.Node, ir.Expr] = {}
    for side in sides:
        first = 0
        for i, axis in enumerate(side.axes):
            pairs = zip(axis.radices, places(axis.radices), strict=True)
            terms = [
                ir.Mul(digit(side.name, first + j, radix), place)
                for j, (radix, place) in enumerate(pairs)
            ]
            found[_coordinate(side, i)] = reduce(ir.Add, terms)
            first += len(axis.radices)
    return found


def _exists(side: Side) -> ir.Pred:
    """Whether a cell of the axes holds a position: the last row may be short."""
    if prod(axis.size for axis in side.axes) == side.length:
        return ir.Bool(True)
    return ir.Le(ir.Var(side.name), ir.Const(side.length - 1))


# --- which digits ---


def _periods(maps: Sequence[ir.Pred], atoms: tuple[ir.Expr, ...]) -> frozenset[int]:
    """The periods of divisions and remainders of ``atoms`` in the maps."""

    def place(x: ir.Expr) -> int | None:
        if x in atoms:
            return 1
        if isinstance(x, ir.FloorDiv):
            total, _ = sum_of(x.expr)
            if len(total) == 1 and next(iter(total)) in atoms:
                return x.divisor
        return None

    found = set()
    for node in {n for m in maps for n in ir.walk(m)}:
        if not isinstance(node, ir.FloorDiv | ir.Mod):
            continue
        for x, factor in sum_of(node.expr)[0].items():
            if (unit := place(x)) is not None:
                found.add(unit * (node.divisor // gcd(node.divisor, factor)))
    return frozenset(found)


def _radices(periods: frozenset[int], length: int) -> tuple[int, ...]:
    """The periods that divide one another as radices, the most significant first."""
    chain = [1]
    for period in sorted(periods):
        if chain[-1] < period < length and period % chain[-1] == 0:
            chain.append(period)
    low = [b // a for a, b in pairwise(chain)]
    return (-(-length // chain[-1]), *reversed(low))
