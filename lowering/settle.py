"""What bounds leave open, settled by looking closer: is there a pair, are there all?

Also counts pairs, exactly, by the same descent.
"""

import numpy as np

from lowering import ir
from lowering.bounds import Analysis, Rectangles
from lowering.predicate import NumPy, evaluate

SPLIT = 4
# A rectangle of at most this many queries and keys is evaluated pair by pair.
SMALL = 16
# Pairs evaluated at once, to bound memory.
CHUNK = 1 << 22


def settle(
    upper: ir.Pred, lower: ir.Pred, at: Rectangles, *, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each rectangle has a pair of ``upper``, and all pairs of ``lower``.

    Past ``budget`` rectangles the rest is taken as partial: one pair, not all.
    """
    owner = np.arange(len(at.q_min))
    some, lacks = np.zeros(len(owner), bool), np.zeros(len(owner), bool)
    _sample(upper, lower, at, owner, some, lacks)
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
        small = (at.q_max - at.q_min < SMALL) & (at.k_max - at.k_min < SMALL)
        _look(upper, lower, _take(at, small), owner[small], some, lacks)
        at, owner = _take(at, ~small), owner[~small]
        analysis = Analysis(at)
        wide = analysis(upper)
        tight = wide if lower is upper else analysis(lower)
        some[owner[wide.hit]] = True
        lacks[owner[tight.miss]] = True
        # A rectangle is spent when neither question can learn more from its parts.
        spent = (wide.none | wide.hit) & (tight.all | tight.miss)
        at, owner = _split(_take(at, ~spent), owner[~spent])
    return some, ~lacks


def count_pairs(node: ir.Pred, at: Rectangles) -> int:
    """How many pairs of the rectangles the node selects, exactly."""
    total = 0
    while len(at.q_min):
        verdict = Analysis(at)(node)
        total += int(_area(_take(at, verdict.all)).sum())
        at = _take(at, ~(verdict.all | verdict.none))
        small = (at.q_max - at.q_min < SMALL) & (at.k_max - at.k_min < SMALL)
        total += _count_small(node, _take(at, small))
        at, _ = _split(_take(at, ~small), np.zeros((~small).sum(), np.int64))
    return total


def count_on_diagonals(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int | None:
    """The pairs of a node that depends on ``q - k`` alone, in linear time, or None."""
    difference = _of_difference(node)
    if difference is None:
        return None
    d = np.arange(1 - kv_seq_len, q_seq_len)[:, None]
    length = np.minimum(q_seq_len, kv_seq_len + d) - np.maximum(0, d)
    held = evaluate(difference, NumPy(d, np.zeros_like(d)))
    return int(length[np.broadcast_to(held, d.shape)].sum())


def _of_difference(node: ir.Node) -> ir.Node | None:
    """``node`` with ``q - k`` written as ``q`` alone, if it reads nothing else."""
    if isinstance(node, ir.Add):
        forms = {ir.Add(ir.Q, ir.Mul(ir.K, -1)): 1, ir.Add(ir.K, ir.Mul(ir.Q, -1)): -1}
        if node in forms:
            return ir.Mul(ir.Q, forms[node])
        if isinstance(node.right, ir.Const):
            inner = _of_difference(node.left)
            return ir.Add(inner, node.right) if isinstance(inner, ir.Expr) else None
    if isinstance(node, ir.Var | ir.Operand | ir.Hoisted):
        return None
    parts = [_of_difference(child) for child in ir.children(node)]
    if any(part is None for part in parts):
        return None
    new = iter(parts)
    return ir.rebuild(node, lambda _: next(new))


def _take(at: Rectangles, which: np.ndarray | slice) -> Rectangles:
    return Rectangles(*(x[which] for x in at))


def _area(at: Rectangles) -> np.ndarray:
    return (at.q_max - at.q_min + 1) * (at.k_max - at.k_min + 1)


def _split(at: Rectangles, owner: np.ndarray) -> tuple[Rectangles, np.ndarray]:
    """Four by four parts of each rectangle, fewer where it is thin."""

    def cuts(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = -(-(high - low + 1) // SPLIT)
        first = low[:, None] + step[:, None] * np.arange(SPLIT)
        return first, np.minimum(first + step[:, None] - 1, high[:, None])

    (q0, q1), (k0, k1) = cuts(at.q_min, at.q_max), cuts(at.k_min, at.k_max)
    shape = (len(owner), SPLIT, SPLIT)
    q0, q1 = (np.broadcast_to(x[:, :, None], shape).ravel() for x in (q0, q1))
    k0, k1 = (np.broadcast_to(x[:, None, :], shape).ravel() for x in (k0, k1))
    real = (q0 <= q1) & (k0 <= k1)
    parts = Rectangles(q0[real], q1[real], k0[real], k1[real])
    return parts, np.repeat(owner, SPLIT * SPLIT)[real]


def _sample(
    upper: ir.Pred, lower: ir.Pred, at: Rectangles, owner: np.ndarray,
    some: np.ndarray, lacks: np.ndarray,
) -> None:  # fmt: skip
    """Marks what a grid of points in each rectangle already shows."""
    fractions = np.linspace(0, 1, 5)
    q = at.q_min[:, None] + np.rint((at.q_max - at.q_min)[:, None] * fractions)
    k = at.k_min[:, None] + np.rint((at.k_max - at.k_min)[:, None] * fractions)
    q, k = q.astype(np.int64)[:, :, None], k.astype(np.int64)[:, None, :]
    _mark(upper, lower, q, k, owner, some, lacks)


def _look(
    upper: ir.Pred, lower: ir.Pred, at: Rectangles, owner: np.ndarray,
    some: np.ndarray, lacks: np.ndarray,
) -> None:  # fmt: skip
    """Evaluates every pair of small rectangles."""
    for part in _chunks(len(owner)):
        q, k, _ = _grid(_take(at, part))
        _mark(upper, lower, q, k, owner[part], some, lacks)


def _mark(
    upper: ir.Pred, lower: ir.Pred, q: np.ndarray, k: np.ndarray, owner: np.ndarray,
    some: np.ndarray, lacks: np.ndarray,
) -> None:  # fmt: skip
    points = NumPy(q, k)
    shape = (len(owner), q.shape[1], k.shape[2])
    held = np.broadcast_to(evaluate(upper, points), shape)
    sure = held
    if lower is not upper:
        sure = np.broadcast_to(evaluate(lower, points), shape)
    some[owner[held.any(axis=(1, 2))]] = True
    lacks[owner[~sure.all(axis=(1, 2))]] = True


def _count_small(node: ir.Pred, at: Rectangles) -> int:
    total = 0
    for part in _chunks(len(at.q_min)):
        q, k, inside = _grid(_take(at, part))
        total += int((evaluate(node, NumPy(q, k)) & inside).sum())
    return total


def _chunks(count: int) -> list[slice]:
    width = CHUNK // (SMALL * SMALL)
    return [slice(i, i + width) for i in range(0, count, width)]


def _grid(at: Rectangles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions ``[n, SMALL, 1]``, ``[n, 1, SMALL]``, clamped, and which are real."""
    steps = np.arange(SMALL)
    q, k = at.q_min[:, None] + steps, at.k_min[:, None] + steps
    real = (q <= at.q_max[:, None])[:, :, None] & (k <= at.k_max[:, None])[:, None, :]
    q, k = np.minimum(q, at.q_max[:, None]), np.minimum(k, at.k_max[:, None])
    return q[:, :, None], k[:, None, :], real
