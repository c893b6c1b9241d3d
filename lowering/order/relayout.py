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

import numpy as np

from lowering import ir, planning
from lowering.order import candidates
from lowering.order.candidates import Layouts
from lowering.order.digits import (
    Side,
    digit,
    in_digits,
    in_slots,
    read_sides,
)
from lowering.order.layout import Layout, places
from lowering.planning import BlockSizes, widest
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.verdicts import Analysis, Verdict

# So many saved pairs for each position pay for one more pass over q, k, v and o. The
# pass that brings heads to the front is needed anyway, and an order of digits can share
# it. On a CPU 148 pairs did not pay, and 212 did.
PAYS = 192
# The number of rows of blocks by which a candidate is judged.
SAMPLE = 8
# So many columns of blocks are judged together first.
WIDE = 64
# So many of such groups, where columns differ, stand for all.
FEW = 96
# An order is refused unless the judge errs by this factor.
UNSURE = 1.5


@dataclass(frozen=True)
class Maps:
    """The distinct maps of the heads, simplified, and how many heads have each."""

    nodes: tuple[ir.Pred, ...]
    map_of_head: tuple[int, ...]

    @property
    def weights(self) -> tuple[int, ...]:
        """The number of heads of each map."""
        return tuple(self.map_of_head.count(i) for i in range(len(self.nodes)))


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
    judge = _Judge(maps, sides, sizes)
    best = next(iter(_ranked(judge)), None)
    if best is None:
        return None
    # The judge errs alike on both orders: their ratio is enough to refuse one.
    share = judge(best) / max(judge(candidates.given(sides)), 1)
    if area * given.visited * share > UNSURE * most:
        return None
    arranged = write(maps, best)
    found = count(arranged.nodes, maps.weights, slots_of(best, sizes))
    return arranged if area * found.visited <= most else None


def write(maps: Maps, layouts: Layouts) -> Arranged:
    """The maps rewritten in slots of ``layouts``."""
    nodes = tuple(in_slots(node, layouts.q, layouts.kv) for node in maps.nodes)
    return Arranged(layouts, nodes)


def slots_of(layouts: Layouts, sizes: BlockSizes) -> BlockSizes:
    """The sizes of a plan over slots."""
    lengths = layouts.q.num_slots, layouts.kv.num_slots
    return BlockSizes(*lengths, sizes.block_q, sizes.block_kv)


def count(
    nodes: Sequence[ir.Pred], weights: Sequence[int], sizes: BlockSizes
) -> Visits:
    """The blocks that plans of maps visit, summed over all heads."""
    visited = partial = 0
    for node, weight in zip(nodes, weights, strict=True):
        found = planning.count(node, sizes)
        visited, partial = visited + weight * found[0], partial + weight * found[1]
    return Visits(visited, partial)


def _ranked(judge: "_Judge") -> list[Layouts]:
    """Candidates sorted by the estimated number of visited blocks, the fewest first."""
    sides, sizes = judge.sides, judge.sizes
    given = candidates.given(sides)
    leading = sorted(dict.fromkeys(candidates.fronts(sides)), key=judge)
    tile = min(sizes.block_q, sizes.block_kv)
    found = dict.fromkeys(leading)
    for layouts in (given, *leading[:1]):
        if layouts is given or judge(layouts) < judge(given):
            found |= dict.fromkeys(candidates.tiled(layouts, tile))
    # Of equal candidates the earlier, simpler one comes first.
    return sorted(found, key=judge)


# --- judgement ---


class _Judge:
    """Estimates from a few rows how many blocks a candidate visits."""

    def __init__(self, maps: Maps, sides: tuple[Side, Side], sizes: BlockSizes) -> None:
        self.sides, self.sizes, self.weights = sides, sizes, maps.weights
        self.nodes = [_open(in_digits(widest(n), sides), sides) for n in maps.nodes]
        self.seen: dict[Layouts, float] = {}

    def __call__(self, layouts: Layouts) -> float:
        """The estimated number of blocks, summed over all heads."""
        if layouts not in self.seen:
            self.seen[layouts] = self._estimate(layouts)
        return self.seen[layouts]

    def _estimate(self, layouts: Layouts) -> float:
        q_slots, kv_slots = layouts.q.num_slots, layouts.kv.num_slots
        num_rows = -(-q_slots // self.sizes.block_q)
        num_columns = -(-kv_slots // self.sizes.block_kv)
        rows = _spread(num_rows, SAMPLE)
        found = 0.0
        groups = np.arange(-(-num_columns // WIDE))
        for node, weight in zip(self.nodes, self.weights, strict=True):
            row, group = (x.ravel() for x in np.meshgrid(rows, groups))
            held = self._verdict(node, layouts, row, group, WIDE)
            inside = np.minimum(WIDE, num_columns - WIDE * group)
            visited = float(inside[held.all].sum())
            open_ = np.flatnonzero(~(held.all | held.none))
            some = open_[_spread(len(open_), FEW)]
            column = (WIDE * group[some, None] + np.arange(WIDE)).ravel()
            row = np.repeat(row[some], WIDE)[column < num_columns]
            column = column[column < num_columns]
            none = self._verdict(node, layouts, row, column, 1).none
            visited += float((~none).sum()) * len(open_) / max(len(some), 1)
            found += weight * visited
        return found * num_rows / len(rows)

    def _verdict(
        self, node: ir.Pred, layouts: Layouts, row: np.ndarray, group: np.ndarray,
        wide: int,
    ) -> Verdict:  # fmt: skip
        """The verdict on rows of blocks and groups of ``wide`` columns of blocks."""
        at: dict[ir.Operand | ir.Hoisted | ir.HoistedBits, tuple] = {}
        blocks = self.sizes.block_q, self.sizes.block_kv * wide
        for side, layout, which, block in zip(
            self.sides, layouts, (row, group), blocks, strict=True
        ):
            once, of = np.unique(which, return_inverse=True)
            low, high = _digit_ranges(layout, side, once, block)
            at |= {_stand_in(side.name, i): (low[i, of], high[i, of])
                   for i in range(len(low))}  # fmt: skip
        zero = np.zeros(len(row), np.int64)
        square = Rectangles(zero, zero, zero, zero)
        return Analysis(Ranges(square, operands=at))(node)


def _spread(count: int, few: int) -> np.ndarray:
    """At most ``few`` of the numbers below ``count``, evenly spread."""
    found = np.linspace(0, max(count - 1, 0), min(few, count))
    return np.unique(found.astype(np.int64))


def _stand_in(name: ir.Side, i: int) -> ir.Operand:
    """A digit as a number with a known range, for the interval analysis."""
    return ir.Operand(f"{name}{i}", ())


def _open(node: ir.Pred, sides: Sequence[Side]) -> ir.Pred:
    new = {
        digit(side.name, i, radix): _stand_in(side.name, i)
        for side in sides
        for i, radix in enumerate(side.radices)
    }
    return ir.replace(node, new)


def _digit_ranges(
    layout: Layout, side: Side, blocks: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest digits in some blocks of slots, ``[digits, blocks]`` each."""
    first = blocks * block
    last = np.minimum(first + block, layout.num_slots) - 1
    ordered = tuple(layout.radices[i] for i in layout.order)
    bounds = {}
    for i, radix, place in zip(layout.order, ordered, places(ordered), strict=True):
        low, high = first // place, last // place
        wraps = low // radix != high // radix
        bounds[i] = (
            np.where(wraps, 0, low % radix),
            np.where(wraps, radix - 1, high % radix),
        )
    lows, highs, count = [], [], 0
    for own, cut in zip(side.axes, layout.axes, strict=True):
        parts = [(p, count + i) for i, p in enumerate(places(cut.radices))]
        above = own.padded * cut.padded + 1
        for place in places(own.radices):
            inside = [(p // place, i) for p, i in parts if place <= p < above]
            lows.append(sum(f * bounds[i][0] for f, i in inside))
            highs.append(sum(f * bounds[i][1] for f, i in inside))
            above = place
        count += len(cut.radices)
    return np.stack(lows), np.stack(highs)
