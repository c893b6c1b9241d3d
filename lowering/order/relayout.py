"""Finds an order of positions in which a map visits fewer blocks, and rewrites the map.

Candidates come from the digits that the expression reads: some of them first (residue
classes of strides and dilations, columns before rows), the others in tiles. Each
candidate is judged by the blocks that a few rows would visit. The best one is planned,
and kept if it saves more than moving the arrays costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from lowering import ir, planning
from lowering.order import candidates
from lowering.order.candidates import Layouts
from lowering.order.digits import in_slots, read_sides
from lowering.order.judge import Judge, Maps, slots_of
from lowering.planning import BlockSizes

# So many saved pairs for each position pay for one more pass over q, k, v and o. The
# pass that brings heads to the front is needed anyway, and an order of digits can share
# it. On a CPU 148 pairs did not pay, and 212 did.
PAYS = 192
# An order is refused unless the judge errs by this factor.
UNSURE = 1.5
# It is refused too if the judge finds no gain but for its own rounding.
SURELY_NOT = 0.9999
# Ranges of heads get orders of their own if these visit at most this share of the
# blocks, and if there are at most so many ranges, since each is a call of its own.
FEWER = 0.75
MOST_APART = 4


class Visits(NamedTuple):
    """Blocks summed over all heads."""

    visited: int
    partial: int


@dataclass(frozen=True)
class Arranged:
    """Maps whose ``q`` and ``k`` are slots of ``layouts``."""

    layouts: Layouts
    nodes: tuple[ir.Pred, ...]


@lru_cache(maxsize=256)
def arrange(maps: Maps, sizes: BlockSizes) -> Arranged | None:
    """The best order of positions for these block sizes, or None for the given one.

    The choice is the same for the same maps and sizes, and never visits more blocks
    than the order as given.
    """
    given, area = count(maps.nodes, maps.weights, sizes), sizes.block_q * sizes.block_kv
    if not _can_pay(given, maps, sizes):
        return None
    most = area * given.visited - _least_gain(maps, sizes)
    judge, best = _judged(maps, sizes)
    if best is None:
        return None
    # The judge errs alike on both orders: their ratio is enough to refuse one.
    share = judge(best) / max(judge(candidates.given(judge.sides)), 1)
    if share > SURELY_NOT or area * given.visited * share > UNSURE * most:
        return None
    arranged = write(maps, best)
    found = count(arranged.nodes, maps.weights, slots_of(best, sizes))
    return arranged if area * found.visited <= most else None


@lru_cache(maxsize=256)
def apart(maps: Maps, sizes: BlockSizes, unit: int = 1) -> tuple[range, ...]:
    """The ranges of heads that are better planned and run each in an order of its own.

    One range with all heads where that saves too little, or where the maps of the heads
    take turns.

    Args:
      maps: the maps of the heads.
      sizes: the lengths and block sizes.
      unit: each range has a multiple of so many heads, which share a key head.
    """
    together = (range(len(maps.map_of_head)),)
    runs = _runs(maps.map_of_head)
    if not 1 < len(runs) <= MOST_APART or any(len(r) % unit for r in runs):
        return together
    given = count(maps.nodes, maps.weights, sizes)
    if not _can_pay(given, maps, sizes):
        return together
    own = sum(_visited(maps.of_heads(r), sizes) for r in runs)
    if own > FEWER * given.visited:
        return together
    # An estimate is enough to tell that no order of all heads comes near.
    judged = _judged(maps, sizes)
    visited = given.visited
    if judged.best is not None:
        visited = min(visited, judged.judge(judged.best))
    area = sizes.block_q * sizes.block_kv
    pays = area * (visited - own) >= _least_gain(maps, sizes)
    return runs if pays and own <= FEWER * visited else together


def _runs(map_of_head: tuple[int, ...]) -> tuple[range, ...]:
    """The ranges of neighbouring heads with one map."""
    count = len(map_of_head)
    cuts = [h for h in range(1, count) if map_of_head[h] != map_of_head[h - 1]]
    return tuple(range(a, b) for a, b in pairwise((0, *cuts, count)))


def _visited(maps: Maps, sizes: BlockSizes) -> int:
    """The blocks of the best order, or of the given one."""
    found = arrange(maps, sizes)
    if found is None:
        return count(maps.nodes, maps.weights, sizes).visited
    return count(found.nodes, maps.weights, slots_of(found.layouts, sizes)).visited


class _Judged(NamedTuple):
    """A judge that has looked at all candidates, and the best one."""

    judge: Judge
    best: Layouts | None


@lru_cache(maxsize=16)
def _judged(maps: Maps, sizes: BlockSizes) -> _Judged:
    sides = read_sides(maps.nodes, sizes.q_seq_len, sizes.kv_seq_len)
    judge = Judge(maps, sides, sizes)
    return _Judged(judge, judge.best())


def _least_gain(maps: Maps, sizes: BlockSizes) -> int:
    """So many pairs have to be saved."""
    return PAYS * sizes.q_seq_len * len(maps.map_of_head)


def _can_pay(given: Visits, maps: Maps, sizes: BlockSizes) -> bool:
    """Whether the partial blocks of the given order have enough pairs to save."""
    # Full blocks are dense in any order. Where they are many, the partial ones are the
    # edges of dense regions, and about half full.
    edges = 4 * given.partial < given.visited
    pairs = sizes.block_q * sizes.block_kv * given.partial
    return pairs >= (2 if edges else 1) * _least_gain(maps, sizes)


def write(maps: Maps, layouts: Layouts) -> Arranged:
    """The maps rewritten in slots of ``layouts``."""
    nodes = tuple(in_slots(node, layouts.q, layouts.kv) for node in maps.nodes)
    return Arranged(layouts, nodes)


def count(
    nodes: Sequence[ir.Pred], weights: Sequence[int], sizes: BlockSizes
) -> Visits:
    """The blocks that plans of maps visit, summed over all heads."""
    visited = partial = 0
    for node, weight in zip(nodes, weights, strict=True):
        found = planning.count(node, sizes)
        visited, partial = visited + weight * found[0], partial + weight * found[1]
    return Visits(visited, partial)
