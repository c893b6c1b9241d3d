"""What a value reads of a pair: positions, or digits of them; and when two are free.

Different digits of one position vary independently on a rectangle whose side is an
aligned box of digits: then a sum of them takes both of its ends, and a test of one says
nothing about the other. Tiles of a grid are such boxes.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from lowering import ir


class Read(NamedTuple):
    """The digit of ``axis`` from place ``first`` up to ``end`` (None: all above)."""

    axis: str
    first: int = 1
    end: int | None = None


Reads: TypeAlias = frozenset[Read]


def digit_read(node: ir.Expr) -> Read | None:
    """The digit that the node is, if it is just that."""
    match node:
        case ir.FloorDiv(ir.Var(axis), place):
            return Read(axis, place)
        case ir.Mod(ir.Var(axis), radix):
            return Read(axis, 1, radix)
        case ir.Mod(ir.FloorDiv(ir.Var(axis), place), radix):
            return Read(axis, place, place * radix)
    return None


def shared_axes(a: Reads, b: Reads) -> frozenset[str]:
    """The axes that both read."""
    return frozenset(x.axis for x in a) & frozenset(x.axis for x in b)


def digits_differ(a: Reads, b: Reads) -> bool:
    """Whether no digit of the one is, or crosses, a digit of the other."""
    for x in a:
        for y in b:
            low, high = sorted((x, y), key=lambda read: read.first)
            if x.axis == y.axis and (low.end is None or high.first % low.end):
                return False
    return True


def places_of(reads: Iterable[Read], axis: str) -> tuple[int, ...]:
    """Where the digits of an axis begin and end, but for 1."""
    mine = [read for read in reads if read.axis == axis]
    places = {p for read in mine for p in (read.first, read.end) if p is not None}
    return tuple(sorted(places - {1}))


def is_box(low: Any, high: Any, places: tuple[int, ...]) -> Any:
    """Whether ``low .. high`` is aligned and each digit is constant or runs through."""
    length = high - low + 1
    found = low % length == 0
    for place in places:
        found = found & ((place % length == 0) | (length % place == 0))
    return found
