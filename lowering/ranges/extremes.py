"""The least and the greatest of some consecutive entries of a table.

Ranges of entries are covered by two overlapping windows of ``2**level`` entries. A long
table has windows of up to ``WIDE`` entries only; its whole groups of ``WIDE`` entries
have windows of their own, so that memory stays linear.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from lowering.expr.evaluate import array_of, floor_log2
from lowering.host_first import is_known, look_up

# The entries of a group of a long table: a power of two.
WIDE = 64


class _Windows(NamedTuple):
    """Minima and maxima of ``2**level`` entries from each on, ``[levels, entries]``."""

    low: np.ndarray
    high: np.ndarray

    def between(self, xp: Any, first: Any, last: Any) -> tuple[Any, Any]:
        """Of entries ``first .. last``, as far as two of the widest windows reach."""
        length = last - first + 1
        if xp is np and (level := self._only_level(length)) is not None:
            low, high = self.low[level, first], self.high[level, first]
            return integers(xp, low), integers(xp, high)
        level = xp.minimum(log2_of(xp, length), len(self.low) - 1)
        at, end = (level, first), (level, last - 2**level + 1)
        low = xp.minimum(look_up(self.low, *at), look_up(self.low, *end))
        high = xp.maximum(look_up(self.high, *at), look_up(self.high, *end))
        return integers(xp, low), integers(xp, high)

    def _only_level(self, length: np.ndarray) -> int | None:
        """The level of windows that cover ranges of one length exactly, or None."""
        width = int(np.max(length, initial=0))
        level = width.bit_length() - 1
        fits = width == 1 << max(level, 0) and level < len(self.low)
        return level if fits and (length == width).all() else None


def bounds_of(
    xp: Any, values: tuple[int, ...], first: Any, last: Any
) -> tuple[Any, Any]:
    """The least and greatest of ``values[first .. last]``; the ends are clipped."""
    first, last = (xp.clip(i, 0, len(values) - 1) for i in (first, last))
    fine, coarse = _windows(values)
    low, high = fine.between(xp, first, last)
    if coarse is None:
        return low, high
    begin, end = (first + WIDE - 1) // WIDE, (last + 1) // WIDE - 1
    whole = begin <= end
    inside = coarse.between(xp, xp.where(whole, begin, 0), xp.where(whole, end, 0))
    return (
        xp.where(whole, xp.minimum(low, inside[0]), low),
        xp.where(whole, xp.maximum(high, inside[1]), high),
    )


def integers(xp: Any, values: Any) -> Any:
    """``values`` as int64 when planning (NumPy), as int32 at run time."""
    if xp is not np:
        return xp.asarray(values, np.int32)
    if isinstance(values, np.ndarray):
        return values.astype(np.int64, copy=False)
    return array_of(values)


def log2_of(xp: Any, x: Any) -> Any:
    """The floor of the binary logarithm, or 0 below 1."""
    if is_known(x):
        return integers(xp, floor_log2(x))
    return 31 - lax.clz(xp.maximum(x, 1))


@lru_cache(maxsize=64)
def _windows(values: tuple[int, ...]) -> tuple[_Windows, _Windows | None]:
    """The windows of the entries, and those of the whole groups of a long table."""
    entries = array_of(values)
    if len(entries) <= WIDE * WIDE:
        return _all_windows(entries, entries, len(entries)), None
    groups = entries[: len(entries) // WIDE * WIDE].reshape(-1, WIDE)
    low, high = groups.min(axis=1), groups.max(axis=1)
    return (
        _all_windows(entries, entries, WIDE),
        _all_windows(low, high, len(low)),
    )


def _all_windows(low: np.ndarray, high: np.ndarray, widest: int) -> _Windows:
    levels = widest.bit_length()
    small = max(-int(low.min()), int(high.max())) < 1 << 31
    lows, highs = (
        np.empty((levels, len(low)), np.int32 if small else np.int64) for _ in range(2)
    )
    lows[0], highs[0] = low, high
    for i in range(1, levels):
        width = 1 << (i - 1)
        for rows, pick in ((lows, np.minimum), (highs, np.maximum)):
            pick(rows[i - 1, :-width], rows[i - 1, width:], out=rows[i, :-width])
            rows[i, -width:] = rows[i - 1, -width:]
    return _Windows(lows, highs)
