"""Chooses how the keys that shards need travel, by the bytes that a device receives.

Keys travel in four ways. A *halo* is a span of keys right before or after those of a
shard: one permute for each shard that it reaches. *Shared* keys, such as sinks, are
needed by many shards: one sum over all shards, to which each adds its own keys.
*Sends* are granules that a shard sends to the one at some distance from it. What would
cost nearly as much as all keys is a gather of all of them, or a ring.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lowering import ir
from lowering.partition.needs import Needs, from_others, needs
from lowering.partition.shards import Shards

# A sum over all devices moves each byte twice, as a scatter and a gather, but for the
# part of each device itself.
SUM = 2
# All keys are gathered where the parts would be more than this share of them, or take
# more permutes.
MOST_OF_ALL = 0.75
MOST_PERMUTES = 64
# A halo is taken instead of sends where it has at most this factor of their bytes: it
# needs no copy by index, and kernels see one span of positions.
HALO_FACTOR = 1.25


@dataclass(frozen=True)
class Send:
    """Granules that each shard sends ``distance`` shards on, in a circle.

    ``granules[s]`` are those that shard ``s`` sends, counted from its first one; -1
    pads. All rows have one length.
    """

    distance: int
    granules: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The granules that a shard receives, with padding."""
        return len(self.granules[0])


@dataclass(frozen=True)
class Exchange:
    """The keys that travel, in one of two forms.

    Attributes:
      shards: how positions are dealt.
      before, after: the granules of the halo on each side.
      shared: the granules of the call that all shards get.
      sends: the rest, by distance.
      everything: all shards need about all keys; the other fields are empty.
    """

    shards: Shards
    before: int = 0
    after: int = 0
    shared: tuple[int, ...] = ()
    sends: tuple[Send, ...] = ()
    everything: bool = False

    @property
    def received(self) -> int:
        """The keys that cross the wire for each device: see ``SUM``."""
        if self.everything:
            return (self.shards.count - 1) * self.shards.kv_size
        sent = sum(send.size for send in self.sends)
        granules = self.before + self.after + sent
        count, size = self.shards.count, self.shards.granule
        summed = SUM * len(self.shared) * size * (count - 1) // count
        return granules * size + summed

    @property
    def traffic(self) -> np.ndarray:
        """The keys that each shard gets of each other one, int ``[shards, shards]``.

        A row is a receiver and a column is a sender. Shared keys count for all.
        """
        shards = self.shards
        count, size = shards.count, shards.granules
        found = np.zeros((count, count), np.int64)
        if self.everything:
            found[:] = size
        for s in range(count):
            for low, high in (
                (s * size - self.before, s * size),
                ((s + 1) * size, (s + 1) * size + self.after),
            ):
                for g in range(max(0, low), min(count * size, high)):
                    found[s, g // size] += 1
            for send in self.sends:
                sender = (s - send.distance) % count
                found[s, sender] += sum(g >= 0 for g in send.granules[sender])
        for granule in self.shared:
            found[:, granule // size] += 1
        np.fill_diagonal(found, 0)
        return found * shards.granule

    @property
    def permutes(self) -> int:
        """The number of permutes of one array."""
        size = self.shards.granules
        return -(-self.before // size) - (-self.after // size) + len(self.sends)

    def __str__(self) -> str:
        if self.everything:
            return "all keys"
        size, parts = self.shards.granule, []
        if self.before or self.after:
            sides = self.before * size, self.after * size
            parts.append(f"halo of {sides[0]:,} keys before and {sides[1]:,} after")
        if self.shared:
            parts.append(f"{len(self.shared) * size:,} shared keys")
        if self.sends:
            sent = sum(send.size for send in self.sends) * size
            parts.append(f"{sent:,} keys from {len(self.sends)} distances")
        return ", ".join(parts) or "nothing"


@lru_cache(maxsize=256)
def exchange(maps: tuple[ir.Pred, ...], shards: Shards) -> Exchange:
    """The cheapest exchange for the queries of all shards to see their keys.

    ``maps`` are simplified predicates without heads, one for each distinct head.
    """
    if shards.count == 1:
        return Exchange(shards)
    needed, owner = from_others(needs(maps, shards), shards)
    if not len(owner):
        return Exchange(shards)
    found = list(_candidates(needed, owner, shards))
    few = [x for x in found if x.permutes <= MOST_PERMUTES]
    everything = Exchange(shards, everything=True)
    best = min(few, key=lambda x: x.received, default=everything)
    if best.received > MOST_OF_ALL * everything.received:
        return everything
    return best


def _candidates(needed: Needs, owner: np.ndarray, shards: Shards) -> Iterator[Exchange]:
    """Exchanges that share what at least so many shards need, for several counts."""
    total = shards.count * shards.granules
    steps = np.zeros(total + 1, np.int64)
    np.add.at(steps, needed.start, 1)
    np.add.at(steps, needed.stop, -1)
    demand = np.cumsum(steps)[:-1]
    least = shards.count
    tried: set[int] = set()
    while least > 1:
        shared = np.flatnonzero(demand >= least)
        # What all shards get must be a small part of all keys.
        if SUM * len(shared) > MOST_OF_ALL * total:
            return
        if len(shared) not in tried:
            tried.add(len(shared))
            yield _with_shared(needed, owner, shards, shared)
        least = least - 1 if least == shards.count else least // 2


def _with_shared(
    needed: Needs, owner: np.ndarray, shards: Shards, shared: np.ndarray
) -> Exchange:
    """The exchange that shares some granules; a halo or sends for the others."""
    total = shards.count * shards.granules
    is_rest = np.ones(total, bool)
    is_rest[shared] = False
    before = np.append(0, np.cumsum(is_rest))
    size = before[needed.stop] - before[needed.start]
    keep = size > 0
    if not keep.any():
        return Exchange(shards, shared=tuple(shared.tolist()))
    rest = Needs(*(x[keep] for x in needed))
    owner, size = owner[keep], size[keep]
    distance = (rest.shard - owner) % shards.count
    by_distance = np.zeros((shards.count, shards.count), np.int64)
    np.add.at(by_distance, (distance, owner), size)
    widest = by_distance.max(axis=1)
    halo = _halo(rest, is_rest, shards)
    together = tuple(shared.tolist())
    if sum(halo) <= HALO_FACTOR * widest.sum():
        return Exchange(shards, *halo, shared=together)
    if np.count_nonzero(widest) > MOST_PERMUTES:
        return Exchange(shards, everything=True)
    sends = tuple(
        Send(int(d), _granules(rest, owner, distance == d, is_rest, shards))
        for d in np.flatnonzero(widest)
    )
    return Exchange(shards, shared=together, sends=sends)


def _halo(rest: Needs, is_rest: np.ndarray, shards: Shards) -> tuple[int, int]:
    """The granules before and after its own that the widest shard needs."""
    index = np.arange(len(is_rest))
    following = np.minimum.accumulate(
        np.where(is_rest, index, len(is_rest))[::-1]
    )[::-1]  # fmt: skip
    preceding = np.maximum.accumulate(np.where(is_rest, index, -1))
    first, last = following[rest.start], preceding[rest.stop - 1]
    own = rest.shard * shards.granules
    before = int(np.max(own - first))
    after = int(np.max(last + 1 - own - shards.granules))
    return max(0, before), max(0, after)


def _granules(
    rest: Needs, owner: np.ndarray, which: np.ndarray, is_rest: np.ndarray,
    shards: Shards,
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """What each shard sends over one distance, counted from its first granule."""
    found: list[list[int]] = [[] for _ in range(shards.count)]
    for i in np.flatnonzero(which):
        span = np.arange(rest.start[i], rest.stop[i])
        mine = span[is_rest[span]] - owner[i] * shards.granules
        found[owner[i]] += mine.tolist()
    most = max(map(len, found))
    return tuple(tuple(x + [-1] * (most - len(x))) for x in found)
