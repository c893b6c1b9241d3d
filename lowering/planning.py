"""Plans a predicate: which blocks are full, partial or empty, as runs of blocks.

Planning starts with the whole square. A rectangle is decided if all of its pairs
attend, none does, or each of its blocks surely holds a mixture; any other rectangle is
split four by four. All rectangles of one level are analysed at once, as arrays, so the
cost follows the boundary of the pattern and not its area.
"""

from dataclasses import dataclass, replace

import numpy as np

from lowering import ir
from lowering.expr import simplify
from lowering.expr.assume import envelope
from lowering.ranges.ranges import Ranges, Rectangles, Sides
from lowering.ranges.refine import settle
from lowering.ranges.verdicts import Analysis
from pallas_kernels.block_mask import Axis, BlockMask, blank, from_runs

SPLIT = 4
# At most so many rectangles are examined where interval analysis leaves a plan open.
BUDGET = 1 << 18


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

    def sides(self, i: np.ndarray, j: np.ndarray, size: int) -> Sides:
        """The rows and columns of these squares, and the row and column of each."""
        rows = np.arange(0, -(-self.q_seq_len // self.block_q), size)
        columns = np.arange(0, -(-self.kv_seq_len // self.block_kv), size)
        first = np.zeros(1, np.int64)
        return Sides(
            self.elements(rows, first, size), i // size,
            self.elements(first, columns, size), j // size,
        )  # fmt: skip

    @property
    def leaf(self) -> tuple[int, int]:
        """The smallest extent of a block: that of the last one, which may be ragged."""
        return (
            self.q_seq_len % self.block_q or self.block_q,
            self.kv_seq_len % self.block_kv or self.block_kv,
        )


@dataclass(frozen=True)
class Squares:
    """Squares of blocks, ``[squares]`` each: corner ``(i, j)``, size, whether full."""

    i: np.ndarray
    j: np.ndarray
    size: np.ndarray
    full: np.ndarray


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
    rows, starts, stops, fulls = [], [], [], []
    for m, node in enumerate(maps):
        found = cover(node, sizes, exact=exact)
        row, start, stop, full = _runs(found, sizes, by)
        rows.append(row + m * like.num_rows)
        starts.append(start)
        stops.append(stop)
        fulls.append(full)
    return from_runs(
        *(np.concatenate(x) for x in (rows, starts, stops, fulls)),
        map_of_head=np.asarray(map_of_head, np.int32),
        like=replace(like, num_maps=len(maps)),
    )


def cover(node: ir.Pred, sizes: BlockSizes, *, exact: bool) -> Squares:
    """Disjoint squares that cover all pairs; the blocks of each are full or partial.

    Run-time operands are unknown here. A block is visited if it holds a pair for some
    value of them, and full only if all its pairs attend for every value.
    """
    upper, lower = widest(node), narrowest(node)
    found: list[tuple] = []
    i, j, size = _roots(sizes)
    while len(i):
        at = sizes.elements(i, j, size)
        sides = sizes.sides(i, j, size)
        analysis = Analysis(Ranges(at, sizes.leaf, sides=sides))
        some = analysis(upper)
        every = some if lower is upper else analysis(lower)
        mixed = some.hits & every.misses
        done = every.all | mixed
        found.append((i[done], j[done], size, every.all[done]))
        open_ = ~(done | some.none)
        if size == 1:
            sure = some.hit & every.miss
            found.append((i[open_ & sure], j[open_ & sure], 1, False))
            rest = np.flatnonzero(open_ & ~sure)
            part = Rectangles(*(x[rest] for x in at))
            some_pair, all_pairs = settle(
                upper, lower, part, budget=None if exact else BUDGET
            )
            kept = rest[some_pair]
            found.append((i[kept], j[kept], 1, all_pairs[some_pair]))
            break
        size //= SPLIT
        i, j = _split(i[open_], j[open_], size, sizes)
    return Squares(
        i=np.concatenate([f[0] for f in found]),
        j=np.concatenate([f[1] for f in found]),
        size=np.concatenate([np.full(len(f[0]), f[2]) for f in found]),
        full=np.concatenate([np.broadcast_to(f[3], f[0].shape) for f in found]),
    )


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


def _roots(sizes: BlockSizes) -> tuple[np.ndarray, np.ndarray, int]:
    like = blank(sizes.q_seq_len, sizes.kv_seq_len, sizes.block_q, sizes.block_kv)
    size = 1
    while size < max(like.num_q_blocks, like.num_kv_blocks):
        size *= SPLIT
    none = np.zeros(min(1, sizes.q_seq_len, sizes.kv_seq_len), np.int64)
    return none, none, size


def _split(
    i: np.ndarray, j: np.ndarray, size: int, sizes: BlockSizes
) -> tuple[np.ndarray, np.ndarray]:
    """The parts of squares, ``size`` wide, that begin inside the sequences."""
    steps = np.arange(SPLIT) * size
    shape = (len(i), SPLIT, SPLIT)
    i = np.broadcast_to(i[:, None, None] + steps[:, None], shape).ravel()
    j = np.broadcast_to(j[:, None, None] + steps, shape).ravel()
    inside = (i * sizes.block_q < sizes.q_seq_len) & (
        j * sizes.block_kv < sizes.kv_seq_len
    )
    return i[inside], j[inside]


def _runs(
    found: Squares, sizes: BlockSizes, by: Axis
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Squares as runs ``(row, start, stop, full)``, sorted, adjacent ones merged."""
    num_q = -(-sizes.q_seq_len // sizes.block_q)
    num_kv = -(-sizes.kv_seq_len // sizes.block_kv)
    squares = _cut_overhang(found, sizes, num_kv)
    i, i_stop, j, j_stop, full = squares
    if by == "kv":
        (i, i_stop), (j, j_stop) = (j, j_stop), (i, i_stop)
        num_q, num_kv = num_kv, num_q
    i_stop, j_stop = np.minimum(i_stop, num_q), np.minimum(j_stop, num_kv)
    height = i_stop - i
    of = np.repeat(np.arange(len(i)), height)
    row = np.arange(len(of)) - np.repeat(np.cumsum(height) - height, height) + i[of]
    of, row = (x[(j < j_stop)[of]] for x in (of, row))
    order = np.argsort(row * (num_kv + 1) + j[of], kind="stable")
    row, start, stop, full = (
        row[order],
        j[of][order],
        j_stop[of][order],
        full[of][order],
    )
    # A run begins where the row, the kind or the adjacency changes.
    begins = np.ones(len(row), bool)
    begins[1:] = (row[1:] != row[:-1]) | (full[1:] != full[:-1])
    begins[1:] |= start[1:] != stop[:-1]
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(row)) - 1 if len(row) else first
    return row[first], start[first], stop[last], full[first]


def _cut_overhang(found: Squares, sizes: BlockSizes, num_kv: int) -> tuple:
    """Makes the last key block of full squares partial if it exceeds the sequence."""
    i, j, full = found.i, found.j, found.full
    i_stop, j_stop = i + found.size, np.minimum(j + found.size, num_kv)
    if sizes.kv_seq_len % sizes.block_kv == 0:
        return i, i_stop, j, j_stop, full
    ragged = full & (j_stop == num_kv)
    edge = np.full(ragged.sum(), num_kv - 1)
    return (
        np.concatenate([i, i[ragged]]),
        np.concatenate([i_stop, i_stop[ragged]]),
        np.concatenate([j, edge]),
        np.concatenate([np.where(ragged, num_kv - 1, j_stop), edge + 1]),
        np.concatenate([full, np.zeros(len(edge), bool)]),
    )
