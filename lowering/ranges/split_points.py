"""Finds the positions at which a predicate changes, where rectangles are best split.

A comparison of a position with a constant changes at the constant, a division or a
remainder at the multiples of its divisor. Between such lines bounds are exact more
often.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.simplify import sum_of


class Lines(NamedTuple):
    """The lines of one axis: at ``constants`` and at multiples of ``periods``."""

    constants: np.ndarray
    periods: tuple[int, ...]

    def parts(
        self, low: np.ndarray, high: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """First and last of ``count`` parts of each range, ``[ranges, count]`` each.

        Of an empty part, the last position is before the first.
        """
        low, high = low[:, None], high[:, None]
        step = -(-(high - low + 1) // count)
        cuts = low + step * np.arange(1, count)
        for period in self.periods:
            # Periods ascend: the largest one that fits decides.
            near = (cuts + period // 2) // period * period
            cuts = np.where((near > low) & (near <= high), near, cuts)
        if len(self.constants):
            at = np.searchsorted(self.constants, cuts)
            for i in (at - 1, at):
                near = self.constants[np.clip(i, 0, len(self.constants) - 1)]
                close = np.abs(near - cuts) <= step // 2
                cuts = np.where(close & (near > low) & (near <= high), near, cuts)
        cuts = np.minimum(np.sort(cuts, axis=1), high + 1)
        first = np.concatenate([low, cuts], axis=1)
        return first, np.concatenate([cuts - 1, high], axis=1)

    def points(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Positions to sample, ``[ranges, points]``: spread, and at ends of digits."""
        length = (high - low)[:, None]
        spread = np.rint(length * np.linspace(0, 1, 5)).astype(np.int64)
        inside = [p for p in self.periods if p <= length.max(initial=0)][-2:]
        steps = np.array([p - 1 for p in inside], np.int64)
        ends = np.concatenate([spread, steps + 0 * length, length - steps], axis=1)
        return low[:, None] + np.clip(ends, 0, length)


class Cuts(NamedTuple):
    """The lines along both axes."""

    q: Lines
    k: Lines


@lru_cache(maxsize=512)
def find_cuts(node: ir.Pred) -> Cuts:
    """The lines of a predicate in normal form."""
    constants: dict[str, set[int]] = {"q": set(), "k": set()}
    periods: dict[str, set[int]] = {"q": set(), "k": set()}
    for part in set(ir.walk(node)):
        match part:
            case ir.Le(ir.Var(axis), ir.Const(value)):
                constants[axis].add(value + 1)
            case ir.Le(ir.Mul(ir.Var(axis), -1), ir.Const(value)):
                constants[axis].add(-value)
            case ir.FloorDiv(inner, n) | ir.Mod(inner, n):
                for atom in sum_of(inner)[0]:
                    if isinstance(atom, ir.Var):
                        periods[atom.axis].add(n)
    return Cuts(*(_lines(constants[axis], periods[axis]) for axis in ("q", "k")))


def _lines(constants: set[int], periods: set[int]) -> Lines:
    return Lines(np.array(sorted(constants), np.int64), tuple(sorted(periods - {1})))
