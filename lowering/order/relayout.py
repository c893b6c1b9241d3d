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
from lowering.order.digit_parts import DigitParts
from lowering.order.digits import (
    Side,
    digit,
    in_digits,
    in_slots,
    read_sides,
)
from lowering.planning import BlockSizes, widest
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.verdicts import Analysis, Verdict

# So many saved pairs for each position pay for one more pass over q, k, v and o. The
# pass that brings heads to the front is needed anyway, and an order of digits can share
# it. On a CPU 148 pairs did not pay, and 212 did.
PAYS = 192
# The number of rows of blocks by which a candidate is judged.
SAMPLE = 8
# Columns of blocks are judged in groups; one that differs is cut in so many.
CUT = 8
# Candidates are judged in turns: by so many of such groups, evenly spread, which stand
# for all of them, and so many candidates are kept.
TURNS = ((12, 16), (48, 4), (512, 1))
# An order is refused unless the judge errs by this factor.
UNSURE = 1.5

_Bounds = dict[ir.Operand | ir.Hoisted | ir.HoistedBits, tuple]


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
    best = _best(judge)
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


def _best(judge: "_Judge") -> Layouts | None:
    """The best candidate, if there is one."""
    sides, sizes = judge.sides, judge.sizes
    given = candidates.given(sides)
    leading = judge.narrowed([*candidates.fronts(sides)], given, TURNS[:2])
    tile = min(sizes.block_q, sizes.block_kv)
    found = dict.fromkeys(leading)
    for layouts in (given, *leading[:1]):
        if layouts is given or judge(layouts) < judge(given):
            found |= dict.fromkeys(candidates.tiled(layouts, tile))
    # Of equal candidates the earlier, simpler one comes first.
    return next(iter(judge.narrowed([*found], given, TURNS)), None)


# --- judgement ---


class _Blocks(NamedTuple):
    """Groups of columns in rows of blocks, of several candidates: ``[groups]`` each.

    ``of`` numbers the candidates, in ascending order, and ``row`` the sampled rows of
    all of them. Each group stands for ``share`` groups.
    """

    of: np.ndarray
    row: np.ndarray
    column: np.ndarray
    share: np.ndarray

    def take(self, which: np.ndarray) -> "_Blocks":
        """Some of the groups."""
        return _Blocks(*(x[which] for x in self))


class _Judge:
    """Estimates from a few rows how many blocks each candidate visits.

    Columns are looked at in groups first, and a group is cut only where the map does
    not hold, or fail, throughout. All candidates are looked at in one array.
    """

    def __init__(self, maps: Maps, sides: tuple[Side, Side], sizes: BlockSizes) -> None:
        self.sides, self.sizes, self.weights = sides, sizes, maps.weights
        self.nodes = [_open(in_digits(widest(n), sides), sides) for n in maps.nodes]
        self.seen: dict[Layouts, float] = {}
        # By how many groups an estimate was made.
        self.by: dict[Layouts, int] = {}

    def __call__(self, layouts: Layouts) -> float:
        """The estimated number of blocks of a ranked candidate, over all heads."""
        return self.seen[layouts]

    def narrowed(
        self,
        every: Sequence[Layouts],
        given: Layouts,
        turns: Sequence[tuple[int, int]],
    ) -> list[Layouts]:
        """The best candidates, the one with the fewest blocks first.

        The given order is judged as closely as they are.
        """
        best = [*dict.fromkeys(every)]
        for few, kept in turns:
            if len(best) > kept or few == turns[-1][0]:
                self._look([given, *best], few)
                best = sorted(best, key=self)[:kept]
        return best

    def _look(self, every: Sequence[Layouts], few: int) -> None:
        """Estimates candidates by ``few`` groups, but for those already seen so."""
        new = [x for x in dict.fromkeys(every) if self.by.get(x, 0) < few]
        if new:
            self.seen |= zip(new, self._estimates(new, few), strict=True)
            self.by |= dict.fromkeys(new, few)

    def _estimates(self, every: Sequence[Layouts], few: int) -> list[float]:
        shapes = np.array([slots_of(x, self.sizes).num_blocks for x in every])
        columns, wide = shapes[:, 1], 1
        while CUT * CUT * wide <= columns.max():
            wide *= CUT
        rows = [_spread(int(x), SAMPLE) for x in shapes[:, 0]]
        num_rows = np.array([len(x) for x in rows])
        of_row = np.repeat(np.arange(len(every)), num_rows)
        q = DigitParts([x.q for x in every], self.sides[0])
        kv = DigitParts([x.kv for x in every], self.sides[1])
        of_rows = q.ranges(of_row, np.concatenate(rows), self.sizes.block_q)
        groups = -(-columns // wide)[of_row]
        row = np.repeat(np.arange(len(of_row)), groups)
        column = np.arange(len(row)) - (np.cumsum(groups) - groups)[row]
        first = _Blocks(of_row[row], row, column, np.ones(len(row)))

        def ranges(at: _Blocks, size: int) -> _Bounds:
            of_columns = kv.ranges(at.of, at.column, self.sizes.block_kv * size)
            found: _Bounds = {
                _stand_in("q", i): (low[at.row], high[at.row])
                for i, (low, high) in enumerate(of_rows)
            }
            return found | {_stand_in("k", i): x for i, x in enumerate(of_columns)}

        bounds = ranges(first, wide)
        found = np.zeros(len(every))
        for node, weight in zip(self.nodes, self.weights, strict=True):
            at, within, size = first, bounds, wide
            while True:
                held = _verdict(node, within, len(at.of))
                inside = np.minimum(size, columns[at.of] - size * at.column)
                visits = ~held.none if size == 1 else held.all
                blocks = at.share * inside * visits
                found += weight * np.bincount(at.of, blocks, len(every))
                open_ = np.flatnonzero(~(held.all | held.none))
                if size == 1 or not len(open_):
                    break
                size //= CUT
                at = _cut(_thin(at.take(open_), few))
                at = at.take(size * at.column < columns[at.of])
                within = ranges(at, size)
        return (found * shapes[:, 0] / num_rows).tolist()


def _verdict(node: ir.Pred, ranges: _Bounds, count: int) -> Verdict:
    zero = np.zeros(count, np.int64)
    square = Rectangles(zero, zero, zero, zero)
    found = Analysis(Ranges(square, operands=ranges))(node)
    none, every = (np.broadcast_to(x, count) for x in (found.none, found.all))
    return found._replace(none=none, all=every)


def _thin(at: _Blocks, few: int) -> _Blocks:
    """At most ``few`` groups of each candidate, evenly spread; these stand for all."""
    count = np.bincount(at.of)
    place = np.arange(len(at.of)) - (np.cumsum(count) - count)[at.of]
    count = count[at.of]
    taken = np.minimum(few, count)
    kept = np.flatnonzero(place * taken % count < taken)
    return at.take(kept)._replace(share=(at.share * count / taken)[kept])


def _cut(at: _Blocks) -> _Blocks:
    """Every group in ``CUT`` smaller ones."""
    at = at.take(np.repeat(np.arange(len(at.of)), CUT))
    parts = np.tile(np.arange(CUT), len(at.of) // CUT)
    return at._replace(column=CUT * at.column + parts)


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
