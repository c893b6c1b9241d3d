"""Estimates from a few rows how many blocks each candidate order visits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.order import candidates
from lowering.order.candidates import Layouts
from lowering.order.digit_parts import DigitParts
from lowering.order.digits import Side, digit, in_digits
from lowering.planning import BlockSizes, widest
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.verdicts import Analysis

# The number of rows of blocks by which a candidate is judged.
SAMPLE = 11
# Columns of blocks are judged in groups; one that differs is cut in so many.
CUT = 8
# Candidates are judged in turns: by so many of such groups, evenly spread, which stand
# for all of them, and so many candidates are kept.
TURNS = ((12, 16), (48, 4), (512, 1))


@dataclass(frozen=True)
class Maps:
    """The distinct maps of the heads, simplified, and how many heads have each."""

    nodes: tuple[ir.Pred, ...]
    map_of_head: tuple[int, ...]

    @property
    def weights(self) -> tuple[int, ...]:
        """The number of heads of each map."""
        return tuple(self.map_of_head.count(i) for i in range(len(self.nodes)))

    def of_heads(self, heads: range) -> "Maps":
        """The maps of some heads."""
        some = [self.map_of_head[h] for h in heads]
        found = sorted({*some})
        nodes = tuple(self.nodes[m] for m in found)
        return Maps(nodes, tuple(found.index(m) for m in some))


def slots_of(layouts: Layouts, sizes: BlockSizes) -> BlockSizes:
    """The sizes of a plan over slots."""
    lengths = layouts.q.num_slots, layouts.kv.num_slots
    return BlockSizes(*lengths, sizes.block_q, sizes.block_kv)


class _Blocks(NamedTuple):
    """Groups of columns in rows of blocks, of several candidates: ``[groups]`` each.

    ``of`` numbers the candidates, in ascending order, and ``row`` the sampled rows of
    all of them. Each group stands for ``share`` groups, and is open for some maps:
    ``open`` is ``[groups, maps]``.
    """

    of: np.ndarray
    row: np.ndarray
    column: np.ndarray
    share: np.ndarray
    open: np.ndarray

    def take(self, which: np.ndarray) -> "_Blocks":
        """Some of the groups."""
        return _Blocks(*(x[which] for x in self))


class Judge:
    """Estimates from a few rows how many blocks each candidate visits.

    Columns are looked at in groups first, and a group is cut only where some map does
    not hold, or fail, throughout. All candidates are looked at in one array. Maps have
    many parts in common, which are analysed once.
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

    def best(self) -> Layouts | None:
        """The best candidate, if there is one."""
        given = candidates.given(self.sides)
        leading = self._narrowed([*candidates.fronts(self.sides)], given, TURNS[:2])
        tile = min(self.sizes.block_q, self.sizes.block_kv)
        found = dict.fromkeys(leading)
        for layouts in (given, *leading[:1]):
            if layouts is given or self(layouts) < self(given):
                found |= dict.fromkeys(candidates.tiled(layouts, tile))
        # Of equal candidates the earlier, simpler one comes first.
        return next(iter(self._narrowed([*found], given, TURNS)), None)

    def _narrowed(
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
        rows = [_spread(int(x)) for x in shapes[:, 0]]
        of_row = np.repeat(np.arange(len(every)), [len(x.number) for x in rows])
        stands_for = np.concatenate([x.share for x in rows])
        q = DigitParts([x.q for x in every], self.sides[0])
        kv = DigitParts([x.kv for x in every], self.sides[1])
        of_rows = q.ranges(
            of_row, np.concatenate([x.number for x in rows]), self.sizes.block_q
        )

        def analysis(at: _Blocks, size: int) -> Analysis:
            of_columns = kv.ranges(at.of, at.column, self.sizes.block_kv * size)
            ends = {
                _stand_in("q", i): (low[at.row], high[at.row])
                for i, (low, high) in enumerate(of_rows)
            }
            ends |= {_stand_in("k", i): x for i, x in enumerate(of_columns)}
            zero = np.zeros(len(at.of), np.int64)
            square = Rectangles(zero, zero, zero, zero)
            return Analysis(Ranges(square, operands={**ends}, rough=True))

        groups = -(-columns // wide)[of_row]
        row = np.repeat(np.arange(len(of_row)), groups)
        column = np.arange(len(row)) - (np.cumsum(groups) - groups)[row]
        everywhere = np.ones((len(row), len(self.nodes)), bool)
        first = _Blocks(of_row[row], row, column, stands_for[row], everywhere)
        return self._visited(first, wide, columns, few, analysis).tolist()

    def _visited(
        self,
        at: _Blocks,
        size: int,
        columns: np.ndarray,
        few: int,
        analysis: Callable[[_Blocks, int], Analysis],
    ) -> np.ndarray:
        """The blocks of the sampled rows that each candidate visits, over all heads.

        Args:
          at: groups of ``size`` columns that cover the rows.
          columns: the number of columns of each candidate.
          few: how many groups of a candidate are cut, for each map.
          analysis: of groups of a size.
        """
        found = np.zeros(len(columns))
        while True:
            verdict = analysis(at, size)
            inside = at.share * np.minimum(size, columns[at.of] - size * at.column)
            blocks = np.zeros(len(at.of))
            for i, (node, weight) in enumerate(
                zip(self.nodes, self.weights, strict=True)
            ):
                none, every = verdict(node)[:2]
                visits = ~none if size == 1 else every
                blocks += weight * (at.open[:, i] & visits)
                at.open[:, i] &= ~(every | none)
            found += np.bincount(at.of, inside * blocks, len(found))
            open_ = np.flatnonzero(at.open.any(axis=1))
            if size == 1 or not len(open_):
                return found
            size //= CUT
            at = _cut(_thin(at.take(open_), few * len(self.nodes)))
            at = at.take(np.flatnonzero(size * at.column < columns[at.of]))


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


class _SampledRows(NamedTuple):
    """Some rows of blocks, and for how many rows each stands: ``[rows]``."""

    number: np.ndarray
    share: np.ndarray


def _spread(count: int) -> _SampledRows:
    """The first row, the last, and some between them, evenly spread.

    The first and the last row stand for themselves: where some queries see all keys,
    or some keys are seen by all queries, they are unlike the others.
    """
    number = np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64))
    share = np.full(len(number), (count - 2) / max(len(number) - 2, 1))
    share[[0, -1]] = 1
    return _SampledRows(number, share)


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
