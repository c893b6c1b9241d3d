"""Finds an order of positions in which a map visits fewer blocks, and rewrites the map.

Candidates come from the digits that the expression reads: some of them first (residue
classes of strides and dilations, columns before rows), the others in tiles. Each
candidate is judged by the blocks that a few rows would visit. The best one is planned,
and kept if it saves more than moving the arrays costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    given = count(maps.nodes, maps.weights, sizes)
    area = sizes.block_q * sizes.block_kv
    least_gain = PAYS * sizes.q_seq_len * len(maps.map_of_head)
    # Full blocks are dense in any order. Where they are many, the partial ones are the
    # edges of dense regions, and about half full.
    edges = 4 * given.partial < given.visited
    if area * given.partial < (2 if edges else 1) * least_gain:
        return None
    most = area * given.visited - least_gain
    sides = read_sides(maps.nodes, sizes.q_seq_len, sizes.kv_seq_len)
    judge = Judge(maps, sides, sizes)
    best = judge.best()
    if best is None:
        return None
    # The judge errs alike on both orders: their ratio is enough to refuse one.
    share = judge(best) / max(judge(candidates.given(sides)), 1)
    if share > SURELY_NOT or area * given.visited * share > UNSURE * most:
        return None
    arranged = write(maps, best)
    found = count(arranged.nodes, maps.weights, slots_of(best, sizes))
    return arranged if area * found.visited <= most else None


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
