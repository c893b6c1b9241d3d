"""Which positions or digits an expression reads, and when two vary independently.

A digit is ``position // place % radix``. Different digits of one position vary
independently on a rectangle whose side is an aligned box: each digit is constant there
or takes all its values. Then a sum of digits attains both of its ends, and a test of
one digit says nothing about another. Tiles of a grid are such boxes.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from lowering import ir


class Read(NamedTuple):
    """The digits of ``axis`` from place ``first`` below ``end`` (None: no end)."""

    axis: str
    first: int = 1
    end: int | None = None


Reads: TypeAlias = frozenset[Read]


def digit_read(node: ir.Expr) -> Read | None:
    """The digit that the node is, or None if it is anything else."""
    match node:
        case ir.FloorDiv(ir.Var(axis), place):
            return Read(axis, place)
        case ir.Mod(ir.Var(axis), radix):
            return Read(axis, 1, radix)
        case ir.Mod(ir.FloorDiv(ir.Var(axis), place), radix):
            return Read(axis, place, place * radix)
    return None


def shared_axes(a: Reads, b: Reads) -> frozenset[str]:
    """The axes that ``a`` and ``b`` both read."""
    return frozenset(x.axis for x in a) & frozenset(x.axis for x in b)


def digits_differ(a: Reads, b: Reads) -> bool:
    """Whether no digit of ``a`` overlaps a digit of ``b``."""
    for x in a:
        for y in b:
            low, high = sorted((x, y), key=lambda read: read.first)
            if x.axis == y.axis and (low.end is None or high.first % low.end):
                return False
    return True


def places_of(reads: Iterable[Read], axis: str) -> tuple[int, ...]:
    """The places where digits of ``axis`` begin and end, sorted, without 1."""
    mine = [read for read in reads if read.axis == axis]
    places = {p for read in mine for p in (read.first, read.end) if p is not None}
    return tuple(sorted(places - {1}))


def is_box(low: Any, high: Any, places: tuple[int, ...]) -> Any:
    """Whether in ``low .. high`` each digit is constant or takes all its values.

    ``places`` are the borders between the digits.
    """
    length = high - low + 1
    found = low % length == 0
    for place in places:
        found = found & ((place % length == 0) | (length % place == 0))
    return found
