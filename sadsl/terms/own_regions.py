"""``regions``: a partition made of two index maps of the caller."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from typing_extensions import override

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.named import where
from sadsl.maps.symbols import table
from sadsl.terms.regions import Partition


@dataclass(frozen=True, repr=False)
class Regions(Partition):
    """A partition made of two index maps; see ``regions``."""

    member_map: IndexMap
    seen_map: IndexMap
    num: int
    covers: IndexMap | None = None

    def __post_init__(self) -> None:
        at_least("regions", "num", self.num, 1)
        for name, item in {"members": self.member_map, "seen": self.seen_map}.items():
            if not isinstance(item, IndexMap):
                raise TypeError(f"regions: {name}={item!r} must be an index map")

    @property
    @override
    def support(self) -> IndexMap:
        return self.seen_map @ self.member_map if self.covers is None else self.covers

    @override
    def check(self, n: int) -> None:
        """Refuses regions that overlap for a query, or do not cover ``covers``.

        Exact: it looks at each pair, in NumPy, once for each length.
        """
        _check(self, n)

    @override
    def num_regions(self, n: int) -> int:
        return self.num

    @override
    def members(self, n: int) -> IndexMap:
        return self.member_map

    @override
    def seen(self, n: int) -> IndexMap:
        inhabited = self.held(n).any(axis=1)
        if inhabited.all():
            return self.seen_map
        flags = table(inhabited.astype(int))
        return self.seen_map & where(lambda q, k: flags[k] == 1)

    def held(self, n: int) -> np.ndarray:
        """Which tokens are in each region, bool ``[num, n]``."""
        return _held(self.member_map, self.num, n)

    def __repr__(self) -> str:
        # Fields and parameters have different names, so all are shown by position.
        return call_text(self, by_position=4)


@lru_cache(maxsize=32)
def _held(members: IndexMap, num: int, n: int) -> np.ndarray:
    return members.dense(num, n)[0]


@lru_cache(maxsize=32)
def _check(partition: Regions, n: int) -> None:
    seen = partition.seen_map.dense(n, partition.num)[0]
    times = seen.astype(np.float32) @ partition.held(n).astype(np.float32)
    wanted = None if partition.covers is None else partition.covers.dense(n)[0]
    twice = np.argwhere(times > 1)
    if len(twice):
        query, key = twice[0]
        raise ValueError(
            f"{partition!r}: query {query} has key {key} in {times[query, key]:.0f} of "
            "the regions that it sees: they must be disjoint; change members or seen"
        )
    if wanted is None:
        return
    wrong = np.argwhere(wanted != (times > 0))
    if len(wrong):
        query, key = wrong[0]
        count = "in no region" if wanted[query, key] else "in a region"
        raise ValueError(
            f"{partition!r} does not cover {partition.covers!r}: query {query} has key "
            f"{key} {count} that it sees; change the maps, or covers"
        )


def regions(
    members: IndexMap, seen: IndexMap, num: int, covers: IndexMap | None = None
) -> Regions:
    """A partition of your own, given by two index maps, for trying partitions out.

    Region ``j`` holds the keys with ``members(j, key)``. The queries with
    ``seen(query, j)`` read it, unless it is empty. The maps are the same for all heads
    and read no run-time arrays. Pools look at every pair of a region and a token; those
    of the built-in partitions take linear time.

    Args:
      members: an index map from regions to keys.
      seen: an index map from queries to regions.
      num: the number of regions.
      covers: the pairs that ``seen @ members`` must be, each by exactly one region;
        checked at the call. None: the composition itself, checked to be disjoint.

    Raises:
      TypeError: ``members`` or ``seen`` is not an index map.
      ValueError: ``num`` is below 1.

    Example:
      Two regions, of even and of odd tokens; a query reads the one it is not in:

      >>> import sadsl as sa
      >>> members = sa.where(lambda region, key: key % 2 == region)
      >>> seen = sa.where(lambda query, region: query % 2 != region)
      >>> parity = sa.regions(members, seen, 2, covers=~sa.strided(2))
      >>> parity.check(4)
      >>> print(parity.support.dense(4)[0].astype(int))
      [[0 1 0 1]
       [1 0 1 0]
       [0 1 0 1]
       [1 0 1 0]]
    """
    return Regions(members, seen, num, covers)
