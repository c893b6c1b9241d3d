"""Plans a predicate: which blocks are full, partial or empty, as runs of blocks.

Planning starts with the whole square. A square of blocks is decided if all of its pairs
attend, none does, or each of its blocks surely holds a mixture; any other square is
split four by four. All squares of one level are analysed at once, as arrays, and of
those that are alike only one is split. The cost follows the number of different
squares: neither the area of the pattern nor the length of its boundary.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr import simplify
from lowering.expr.assume import envelope
from lowering.ranges.alike import Alike, distinct
from lowering.ranges.quadtree import (
    EMPTY,
    FIRST,
    FULL,
    LOW,
    PARTIAL,
    Parts,
    Tree,
)
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.refine import settle
from lowering.ranges.split_points import find_cuts
from lowering.ranges.verdicts import Analysis
from pallas_kernels.block_mask import Axis, BlockMask, blank

SPLIT = 4
# At most so many rectangles are examined where interval analysis leaves a plan open.
BUDGET = 1 << 18
# Squares are split into halves if there are so many of them, else into quarters: that
# takes more levels, and asks about fewer squares.
MANY = 1000
# Into more parts than that if no more squares than these are then looked at.
AT_ONCE = 1024
# A period is a product of 2 and these.
PRIMES = (31, 29, 23, 19, 17, 13, 11, 7, 5, 3)


@dataclass(frozen=True)
class BlockSizes:
    """The sequence lengths and block sizes of a plan."""

    q_seq_len: int
    kv_seq_len: int
    block_q: int
    block_kv: int

    def elements(self, i: np.ndarray, j: np.ndarray, size: int) -> Rectangles:
        """The pairs of the squares at ``(i, j)``, clipped to the sequence lengths.

        ``i`` and ``j`` are int arrays ``[squares]``; they and ``size`` count blocks.
        """
        q, k = i * self.block_q, j * self.block_kv
        return Rectangles(
            q,
            np.minimum(q + size * self.block_q, self.q_seq_len) - 1,
            k,
            np.minimum(k + size * self.block_kv, self.kv_seq_len) - 1,
        )

    @property
    def leaf(self) -> tuple[int, int]:
        """The smallest extent of a block: that of the last one, which may be ragged."""
        return (
            self.q_seq_len % self.block_q or self.block_q,
            self.kv_seq_len % self.block_kv or self.block_kv,
        )

    @property
    def num_blocks(self) -> tuple[int, int]:
        """The numbers of query blocks and of key blocks."""
        return -(-self.q_seq_len // self.block_q), -(-self.kv_seq_len // self.block_kv)


def plan(
    maps: tuple[ir.Pred, ...],
    map_of_head: tuple[int, ...],
    sizes: BlockSizes,
    *,
    by: Axis = "q",
    exact: bool = False,
) -> BlockMask:
    """Plans every map: always sound, and exact unless the budget runs out.

    Args:
      maps: distinct simplified predicates without heads.
      map_of_head: the index into ``maps`` for each head.
      sizes: sequence lengths and block sizes.
      by: rows of queries (forward, dq), or of keys (the transposed plan).
      exact: evaluate every undecided block, however many there are.
    """
    like = blank(sizes.q_seq_len, sizes.kv_seq_len, sizes.block_q, sizes.block_kv, by)
    shape, across = (like.num_rows, like.num_columns), by == "kv"
    found = [squares(m, sizes, exact).rows(*shape, across=across) for m in maps]
    lengths = np.concatenate([np.diff(x.ptr) for x in found])
    runs = found[0].runs if len(maps) == 1 else np.concatenate([x.runs for x in found])
    ptr = np.append(0, np.cumsum(lengths))
    start = (runs >> 32).astype(np.int32)
    stop = ((runs & LOW) >> 1).astype(np.int32)
    blocks = np.append(0, np.cumsum(stop - start, dtype=np.int64))
    return replace(
        like,
        row_ptr=ptr.astype(np.int32),
        run_start=start,
        run_stop=stop,
        run_full=(runs & 1).astype(np.int32),
        map_of_head=np.asarray(map_of_head, np.int32),
        num_maps=len(maps),
        max_runs=int(lengths.max(initial=0)),
        max_blocks=int(np.diff(blocks[ptr]).max(initial=0)),
    )


def count(node: ir.Pred, sizes: BlockSizes, *, exact: bool = False) -> tuple[int, int]:
    """The visited and the partial blocks of a simplified predicate, without a plan."""
    return squares(node, sizes, exact).count()


@lru_cache(maxsize=256)
def squares(node: ir.Pred, sizes: BlockSizes, exact: bool) -> Tree:
    """The squares of blocks that hold all pairs: each full, or partial throughout.

    Run-time operands are unknown here. A block is visited if it holds a pair for some
    value of them, and full only if all its pairs attend for every value.
    """
    budget = None if exact else BUDGET
    question = _Undecided(widest(node), narrowest(node), sizes, budget)
    rows, columns = sizes.num_blocks
    size = period = _period(question.upper, sizes)
    while size < max(rows, columns):
        size *= SPLIT
    i = j = np.zeros((1, 1, 1), np.int64)
    levels = []
    while True:
        kind, first = question.decide(i.ravel(), j.ravel(), size)
        height, width = (
            np.clip(count - at, 0, size) for at, count in ((i, rows), (j, columns))
        )
        levels.append(Parts(size, kind.reshape(i.shape), height * width))
        if not len(first):
            return Tree(tuple(levels))
        parts = _num_parts(size, period, len(first))
        size //= parts
        steps = np.arange(parts) * size
        shape = (len(first), parts, parts)
        i, j = (x.ravel()[first, None, None] for x in (i, j))
        i = np.broadcast_to(i + steps[:, None], shape)
        j = np.broadcast_to(j + steps, shape)


def _period(node: ir.Pred, sizes: BlockSizes) -> int:
    """The longest period of a map, in blocks, that splits into few equal parts, or 1.

    Squares as wide as a period are alike. For a power of two, all squares are.
    """
    if sizes.block_q != sizes.block_kv:
        return 1
    cuts = find_cuts(node)
    blocks = {
        lcm(n, sizes.block_q) // sizes.block_q
        for n in (*cuts.q.periods, *cuts.k.periods)
    }
    most = max(sizes.num_blocks) // SPLIT
    return max((n for n in blocks if n <= most and _is_smooth(n)), default=1)


def _is_smooth(n: int) -> bool:
    """Whether ``n`` is a product of small primes, and no power of two."""
    odd = n // (n & -n)
    return odd > 1 and pow(prod(PRIMES), odd.bit_length(), odd) == 0


def _num_parts(size: int, period: int, count: int) -> int:
    """Into how many parts each side of ``count`` squares is split.

    Few squares are split into many parts: a level takes some time however small it is.
    """
    wide = size // period if size > period else size
    if wide % 2:
        return next(n for n in PRIMES if wide % n == 0)
    fits = (n for n in (16, 8, 4) if wide % n == 0 and count * n * n <= AT_ONCE)
    if (parts := next(fits, None)) is not None:
        return parts
    return SPLIT if count < MANY and wide % SPLIT == 0 else 2


class _Undecided(NamedTuple):
    """A predicate that holds wherever a map may, and one that does only if it surely
    does, which ask of each square what it holds."""

    upper: ir.Pred
    lower: ir.Pred
    sizes: BlockSizes
    budget: int | None

    def decide(
        self, i: np.ndarray, j: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What each square is, and the first of each kind that has to be split.

        ``i`` and ``j`` are the corners of squares ``size`` wide, int ``[squares]``.
        """
        rows, columns = self.sizes.num_blocks
        inside = np.flatnonzero((i < rows) & (j < columns))
        at = self.sizes.elements(i[inside], j[inside], size)
        analysis = Analysis(Ranges(at, self.sizes.leaf))
        some = analysis(self.upper)
        every = some if self.lower is self.upper else analysis(self.lower)
        # A full block does not reach beyond the last key.
        ragged = self.sizes.kv_seq_len % self.sizes.block_kv
        cut = (j[inside] + size >= columns) & bool(ragged)
        mixed = some.hits & every.misses
        if size == 1:
            mixed = mixed | (some.hit & every.miss) | (every.all & cut)
        kind = np.where(every.all & ~cut, FULL, np.where(mixed, PARTIAL, FIRST))
        kind = np.where(some.none, EMPTY, kind)
        open_ = np.flatnonzero(kind == FIRST)
        first = np.zeros(0, np.int64)
        if len(open_):
            new, kind_of = self._alike(analysis, open_)
            first = open_[new]
            kind[open_] = FIRST + kind_of
            if size == 1:
                kind[open_] = self._settled(at, cut, first)[kind_of]
                first = first[:0]
        found = np.zeros(len(i), np.int64)
        found[inside] = kind
        return found, inside[first]

    def _alike(
        self, analysis: Analysis, which: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first of each kind among some rectangles, and the kind of each."""
        at = analysis.at
        nodes = (self.upper,) if self.lower is self.upper else (self.upper, self.lower)
        sides = at.q_max - at.q_min, at.k_max - at.k_min
        marks = [side[which] for side in sides] + Alike(analysis, which).marks(*nodes)
        return distinct(marks, len(which))

    def _settled(self, at: Rectangles, cut: np.ndarray, of: np.ndarray) -> np.ndarray:
        """What single blocks hold that the analysis leaves open."""
        part = Rectangles(*(x[of] for x in at))
        some, every = settle(self.upper, self.lower, part, budget=self.budget)
        return np.where(some, np.where(every & ~cut[of], FULL, PARTIAL), EMPTY)


def widest(node: ir.Pred) -> ir.Pred:
    """A predicate that holds wherever ``node`` does, for any value of operands."""
    return _assume(node, held=True)


def narrowest(node: ir.Pred) -> ir.Pred:
    """A predicate that holds only where ``node`` does, for every value of operands."""
    return _assume(node, held=False)


def _assume(node: ir.Pred, *, held: bool) -> ir.Pred:
    """The node with each comparison that reads an operand replaced by ``held``."""
    if not ir.operand_names(node):
        return node
    return simplify.simplify(envelope(node, lambda _: True, held=held))
