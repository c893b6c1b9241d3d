"""Ranges of digits in blocks of slots, for many layouts at once."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from lowering.order.digits import Side
from lowering.order.layout import Layout, places


class DigitParts:
    """The digits of a side, in the slots of several layouts.

    A layout may cut a digit. The digit is then the sum of its parts, and each part is
    ``factor * (slot // place % radix)``.
    """

    def __init__(self, layouts: Sequence[Layout], side: Side) -> None:
        self._slots = np.array([layout.num_slots for layout in layouts])
        found = [_parts(layout, side) for layout in layouts]
        most = max(len(x) for parts in found for x in parts)
        # [layouts, digits, parts, (factor, place, radix)]
        self._table = np.array(
            [[x + ((0, 1, 1),) * (most - len(x)) for x in parts] for parts in found]
        )

    def ranges(
        self, of: np.ndarray, number: np.ndarray, block: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The least and the greatest value of each digit in some blocks of slots.

        Args:
          of: the layout of each block.
          number: which block of the layout it is.
          block: the slots of a block.
        """
        first = number * block
        last = np.minimum(first + block, self._slots[of]) - 1
        return [self._range(d, of, first, last) for d in range(self._table.shape[1])]

    def _range(
        self, digit: int, of: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        least = greatest = np.zeros(len(of), np.int64)
        for part in np.moveaxis(self._table[:, digit], 1, 0):
            # One number for all layouts is quicker to divide by.
            factor, place, radix = (
                x[0] if (x == x[0]).all() else x[of] for x in part.T
            )
            low, high = first // place, last // place
            low_turn, high_turn = low // radix, high // radix
            wraps = low_turn != high_turn
            low = np.where(wraps, 0, low - low_turn * radix)
            high = np.where(wraps, radix - 1, high - high_turn * radix)
            least, greatest = least + factor * low, greatest + factor * high
        return least, greatest


@lru_cache(maxsize=4096)
def _parts(layout: Layout, side: Side) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """(factor, place, radix) of each part of each digit of ``side``."""
    radices = layout.radices
    ordered = tuple(radices[i] for i in layout.order)
    place_of = dict(zip(layout.order, places(ordered), strict=True))
    firsts = accumulate((len(axis.radices) for axis in layout.axes), initial=0)
    found = []
    for own, cut, first in zip(side.axes, layout.axes, firsts, strict=False):
        above = own.padded * cut.padded + 1
        for place in places(own.radices):
            inside = [
                (p // place, place_of[first + i], cut.radices[i])
                for i, p in enumerate(places(cut.radices))
                if place <= p < above
            ]
            found.append(tuple(inside))
            above = place
    return tuple(found)
