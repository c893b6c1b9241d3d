"""Finds the fewest hops that reach every pair: by doubling, then by bisection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Hops:
    """The number of hops until all visible pairs are reached.

    Attributes:
      least, most: bounds of that number; ``least`` is None if some pair is never
        reached, ``most`` is None if no bound was found.
      reach: ``(depth, least share, most share)`` of the visible pairs, by depth.
    """

    least: int | None
    most: int | None
    reach: tuple[tuple[int, float, float], ...]

    @property
    def exact(self) -> bool:
        """Whether the number is known exactly, or known not to exist."""
        return self.least is None or self.least == self.most


class Doubling(NamedTuple):
    """A search: ``join(a, b)`` makes the state after i + j hops, for j <= i.

    ``start`` is the state after one hop. ``done``: whether all visible pairs are
    reached. ``share``: the share of the visible pairs that are reached.
    """

    start: tuple[np.ndarray, ...]
    join: Callable[..., tuple[np.ndarray, ...]]
    done: Callable[[tuple[np.ndarray, ...]], bool]
    share: Callable[[tuple[np.ndarray, ...]], float]


def exact(count: int | None, met: dict[int, float]) -> Hops:
    """The result of an exact search."""
    reach = tuple((d, s, s) for d, s in sorted(met.items()))
    return Hops(count, count, reach)


def search(by: Doubling) -> tuple[int | None, dict[int, float]]:
    """The fewest hops for which ``by.done``, or None; and the shares by depth."""
    powers = [by.start]
    met = {1: by.share(by.start)}
    while not by.done(powers[-1]):
        state = by.join(powers[-1], powers[-1])
        if all((a == b).all() for a, b in zip(state, powers[-1], strict=True)):
            return None, met
        powers.append(state)
        met[2 ** (len(powers) - 1)] = by.share(state)
    if len(powers) == 1:
        return 1, met
    # The last power but one is not enough: bisect between it and the last.
    count, state = 2 ** (len(powers) - 2), powers[-2]
    for i in range(len(powers) - 3, -1, -1):
        further = by.join(state, powers[i])
        met[count + 2**i] = by.share(further)
        if not by.done(further):
            count, state = count + 2**i, further
    return count + 1, met


def shares(
    lower: dict[int, float], upper: dict[int, float], rest: float
) -> tuple[tuple[int, float, float], ...]:
    """Bounds ``(depth, least, most)`` at the depths of both searches.

    ``rest`` is the share of the pairs within blocks, of which nothing is known.
    """
    found = []
    for d in sorted({*lower, *upper}):
        least = max((s for i, s in lower.items() if i <= d), default=0.0)
        most = min((s for i, s in upper.items() if i >= d), default=1 - rest)
        found.append((d, least, min(1.0, most + rest)))
    return tuple(found)


def on_pairs(pairs: np.ndarray, *, causal: bool) -> Doubling:
    """The search on boolean matrices of pairs, ``[n, n]`` or ``[batch, n, n]``."""
    n = pairs.shape[-1]
    visible = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    return Doubling(
        start=(pairs | np.eye(n, dtype=bool),),
        join=lambda a, b: (product(a[0], b[0]),),
        done=lambda state: bool((state[0] | ~visible).all()),
        share=lambda state: float((state[0] & visible).mean() / visible.mean()),
    )


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The boolean matrix product."""
    return (a.astype(np.float32) @ b.astype(np.float32)) > 0
