"""Decides blocks that interval analysis could not, by subdividing and evaluating them.

Two questions are asked of each rectangle: is there a pair, and are all pairs there? The
same descent also counts pairs exactly.
"""

from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.split_points import Cuts, find_cuts
from lowering.ranges.verdicts import Analysis

SPLIT = 4
# A rectangle of at most this many queries and keys is evaluated pair by pair.
SMALL = 16
# Pairs evaluated at once, to bound memory.
CHUNK = 1 << 22
# When counting: the side of rectangles that are evaluated pair by pair, the pairs that
# are evaluated at once, and the rectangles that are analysed at once.
LEAF = 32
PAIRS = 1 << 19
AT_ONCE = 1 << 14


def settle(
    upper: ir.Pred, lower: ir.Pred, at: Rectangles, *, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each rectangle has a pair of ``upper``, and all pairs of ``lower``.

    After ``budget`` rectangles the others are taken as partial: some pair, not all.

    Returns:
      Two bool arrays ``[rectangles]``: has some pair, has all pairs.
    """
    owner = np.arange(len(at.q_min))
    some, lacks = np.zeros(len(owner), bool), np.zeros(len(owner), bool)
    cuts = find_cuts(upper)
    question = _Question(upper, lower, some, lacks)
    question.sample(at, owner, cuts)
    looked = 0
    while True:
        keep = ~(some[owner] & lacks[owner])
        at, owner = _take(at, keep), owner[keep]
        if not len(owner):
            break
        looked += len(owner)
        if budget is not None and looked > budget:
            some[owner], lacks[owner] = True, True
            break
        small = _is_small(at, SMALL)
        question.look(_take(at, small), owner[small])
        at, owner = _take(at, ~small), owner[~small]
        analysis = Analysis(Ranges(at))
        wide = analysis(upper)
        tight = wide if lower is upper else analysis(lower)
        some[owner[wide.hit]] = True
        lacks[owner[tight.miss]] = True
        # A rectangle is spent when neither question can learn more from its parts.
        spent = (wide.none | wide.hit) & (tight.all | tight.miss)
        at, owner = _split(_take(at, ~spent), owner[~spent], cuts)
    return some, ~lacks


def count_within(node: ir.Pred, at: Rectangles) -> int:
    """How many pairs of the rectangles the node selects, exactly.

    A bounded number of rectangles is analysed at a time, the newest first, so that
    memory stays bounded.
    """
    total, cuts = 0, find_cuts(node)
    open_ = [_take(at, part) for part in _slices(len(at.q_min), AT_ONCE)]
    while open_:
        at = open_.pop()
        verdict = Analysis(Ranges(at))(node)
        total += int(_area(_take(at, verdict.all)).sum())
        at = _take(at, ~(verdict.all | verdict.none))
        small = _is_small(at, LEAF)
        total += _count_small(node, _take(at, small))
        at, owner = _split(_take(at, ~small), np.zeros((~small).sum(), np.int64), cuts)
        open_ += [_take(at, part) for part in _slices(len(owner), AT_ONCE)]
    return total


def _take(at: Rectangles, which: np.ndarray | slice) -> Rectangles:
    return Rectangles(*(x[which] for x in at))


def _area(at: Rectangles) -> np.ndarray:
    return (at.q_max - at.q_min + 1) * (at.k_max - at.k_min + 1)


def _is_small(at: Rectangles, size: int) -> np.ndarray:
    return (at.q_max - at.q_min < size) & (at.k_max - at.k_min < size)


def _split(
    at: Rectangles, owner: np.ndarray, cuts: Cuts
) -> tuple[Rectangles, np.ndarray]:
    """Splits each rectangle into four by four parts, fewer where it is thin."""
    q0, q1 = cuts.q.parts(at.q_min, at.q_max, SPLIT)
    k0, k1 = cuts.k.parts(at.k_min, at.k_max, SPLIT)
    shape = (len(owner), SPLIT, SPLIT)
    q0, q1 = (np.broadcast_to(x[:, :, None], shape).ravel() for x in (q0, q1))
    k0, k1 = (np.broadcast_to(x[:, None, :], shape).ravel() for x in (k0, k1))
    real = (q0 <= q1) & (k0 <= k1)
    parts = Rectangles(q0[real], q1[real], k0[real], k1[real])
    return parts, np.repeat(owner, SPLIT * SPLIT)[real]


class _Question(NamedTuple):
    """The predicates, and what is known of each block so far.

    ``some`` and ``lacks`` are bool ``[blocks]``: a pair of ``upper`` was found, and a
    pair that is not in ``lower``.
    """

    upper: ir.Pred
    lower: ir.Pred
    some: np.ndarray
    lacks: np.ndarray

    def sample(self, at: Rectangles, owner: np.ndarray, cuts: Cuts) -> None:
        """Evaluates the corners of each rectangle, then more points where undecided."""
        q, k = (np.stack(ends, 1) for ends in (at[:2], at[2:]))
        self._evaluate(q, k, owner)
        rest = ~(self.some[owner] & self.lacks[owner])
        at, owner = _take(at, rest), owner[rest]
        q = cuts.q.points(at.q_min, at.q_max)
        self._evaluate(q, cuts.k.points(at.k_min, at.k_max), owner)

    def _evaluate(self, q: np.ndarray, k: np.ndarray, owner: np.ndarray) -> None:
        """Evaluates all pairs of ``q`` and ``k``, ``[rectangles, points]`` each."""
        width = max(1, CHUNK // (q.shape[1] * k.shape[1]))
        for i in range(0, len(owner), width):
            part = slice(i, i + width)
            self._mark(q[part, :, None], k[part, None, :], owner[part])

    def look(self, at: Rectangles, owner: np.ndarray) -> None:
        """Evaluates every pair of small rectangles."""
        for part in _slices(len(owner), CHUNK // (SMALL * SMALL)):
            q, k, _ = _grid(_take(at, part))
            self._mark(q, k, owner[part])

    def _mark(self, q: np.ndarray, k: np.ndarray, owner: np.ndarray) -> None:
        points = NumPy(q, k)
        shape = (len(owner), q.shape[1], k.shape[2])
        held = np.broadcast_to(evaluate(self.upper, points), shape)
        sure = held
        if self.lower is not self.upper:
            sure = np.broadcast_to(evaluate(self.lower, points), shape)
        self.some[owner[held.any(axis=(1, 2))]] = True
        self.lacks[owner[~sure.all(axis=(1, 2))]] = True


def _count_small(node: ir.Pred, at: Rectangles) -> int:
    total = 0
    for part in _slices(len(at.q_min), PAIRS // (LEAF * LEAF)):
        q, k, inside = _grid(_take(at, part))
        total += int((evaluate(node, NumPy(q, k)) & inside).sum())
    return total


def _slices(count: int, width: int) -> list[slice]:
    return [slice(i, i + width) for i in range(0, count, width)]


def _grid(at: Rectangles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions ``[n, rows, 1]`` and ``[n, 1, columns]``, and which pairs are inside.

    Rectangles differ in size: positions beyond the end of one are clamped to it.
    """
    rows, columns = (
        np.arange(1 + (high - low).max(initial=0))
        for low, high in ((at.q_min, at.q_max), (at.k_min, at.k_max))
    )
    q, k = at.q_min[:, None] + rows, at.k_min[:, None] + columns
    real = (q <= at.q_max[:, None])[:, :, None] & (k <= at.k_max[:, None])[:, None, :]
    q, k = np.minimum(q, at.q_max[:, None]), np.minimum(k, at.k_max[:, None])
    return q[:, :, None], k[:, None, :], real
