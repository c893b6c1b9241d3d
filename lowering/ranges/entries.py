"""Looks for entries of a table that lie within a range of values.

The least and the greatest of some entries say little of a table in random order.
Whether one of them lies in a range of values tells exactly whether a comparison such as
``table[q // 64] == k // 64`` holds for some pair of a rectangle.
"""

from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import array_of

# So many entries are tried one by one.
FEW = 4


class Held(NamedTuple):
    """Whether some entry has a value of the range: bool arrays ``[rectangles]``.

    Where ``exact`` is false, ``some`` may be true though there is none.
    """

    some: np.ndarray
    exact: np.ndarray


def held(
    values: tuple[int, ...],
    first: np.ndarray,
    last: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> Held:
    """Whether one of the entries ``first .. last`` has a value in ``low .. high``.

    A few entries are tried one by one. Others are taken in groups of one size, a power
    of two, which is that of the blocks of a square: two groups hold those that are
    asked for, and most often one.
    """
    most = int(np.max(last - first, initial=0))
    if most < FEW:
        entries = array_of(values)
        found = [entries[np.minimum(first + i, last)] for i in range(most + 1)]
        some = reduce(or_, [(low <= x) & (x <= high) for x in found])
        return Held(some, np.ones(len(some), bool))
    width = 1 << most.bit_length()
    groups = _sorted_groups(values, width)
    of, end = first // width, last // width
    some = groups.have(of, low, high)
    if (of != end).any():
        some = some | groups.have(end, low, high)
    whole = np.minimum(of * width + width, len(values)) - 1
    return Held(some, (first == of * width) & (last == whole))


class _Groups(NamedTuple):
    """The entries of each group in ascending order, as one ascending array.

    An entry is ``group * span + value - least``.
    """

    keys: np.ndarray
    least: int
    span: int

    def have(self, group: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Whether the group has a value in ``low .. high``."""
        begin, end = (
            group * self.span + np.clip(x - self.least, 0, self.span - 1)
            for x in (low, high + 1)
        )
        return self.keys.searchsorted(begin) < self.keys.searchsorted(end)


@lru_cache(maxsize=32)
def _sorted_groups(values: tuple[int, ...], width: int) -> _Groups:
    entries = array_of(values)
    least = int(entries.min())
    span = int(entries.max()) - least + 2
    keys = np.arange(len(entries)) // width * span + (entries - least)
    return _Groups(np.sort(keys), least, span)


def around(expr: ir.Expr, table: ir.Table) -> tuple[int, ir.Expr] | None:
    """``factor, rest`` if the expression is ``table * factor + rest``, else None."""
    if expr == table:
        return 1, ir.Const(0)
    if not any(isinstance(node, ir.Table) for node in ir.walk(expr)):
        return 0, expr
    match expr:
        case ir.Add(a, b):
            left, right = around(a, table), around(b, table)
            if left is None or right is None:
                return None
            return left[0] + right[0], ir.Add(left[1], right[1])
        case ir.Mul(a, n):
            inner = around(a, table)
            return inner and (inner[0] * n, ir.Mul(inner[1], n))
        case ir.Within(a, _):
            return around(a, table)
    return None
