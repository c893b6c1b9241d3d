"""Bounds the number of hops of a map by paths between blocks of positions.

Paths over blocks with some pair bound the number from below, paths over blocks with all
pairs from above.
"""

from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify
from lowering.facts.doubling import Doubling, Hops, on_pairs, product, search, shares
from lowering.facts.first_and_last import in_finite
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.refine import settle
from lowering.ranges.verdicts import Analysis
from lowering.solve.eliminate import MIDDLE, exists, values_of

MOST_BLOCKS = 512
# At most so many borders between blocks come from constants in the map.
MOST_CUTS = 8
# At most so many queries and keys are examined for "each query has some key there".
MOST_ROWS = 1 << 22
# At most so many pairs of diagonal blocks are evaluated.
MOST_PAIRS = 1 << 28


def hops_of_blocks(node: ir.Pred, n: int, *, causal: bool) -> Hops:
    """Bounds of the hops of a map in normal form, from one or a few block sizes."""
    best: Hops | None = None
    for size in _block_sizes(node, n):
        found = _on_blocks(node, n, size, causal=causal)
        best = found if best is None else _both(best, found)
        if best.exact:
            break
    assert best is not None
    return best


def special_cuts(node: ir.Pred, n: int) -> list[int]:
    """Positions at which a comparison with a constant changes: ``k < 4`` gives 4."""
    found = set()
    for part in ir.walk(node):
        match part:
            case ir.Le(ir.Var(), ir.Const(value)):
                found.add(value + 1)
            case ir.Le(ir.Mul(ir.Var(), -1), ir.Const(value)):
                found.add(-value)
    return sorted(c for c in found if 0 < c < n)[:MOST_CUTS]


class BlockGraph(NamedTuple):
    """What is known of each block of pairs: bool arrays ``[blocks, blocks]``.

    ``some``: it holds a pair. ``all``: it holds all pairs. ``rows``: each of its
    queries has a key in it. ``columns``: each of its keys has a query in it. In all but
    ``all``, a position counts as its own key.
    """

    some: np.ndarray
    all: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def _block_sizes(node: ir.Pred, n: int) -> list[int]:
    """Block sizes to try: one from the length, and divisors that occur in the map."""
    plain = 4
    while -(-n // plain) > MOST_BLOCKS:
        plain *= 2
    own = {p.divisor for p in ir.walk(node) if isinstance(p, ir.FloorDiv | ir.Mod)}
    fitting = [s for s in own if s >= 4 and 8 <= -(-n // s) <= MOST_BLOCKS]
    return sorted({plain, *sorted(fitting, reverse=True)[:2]}, reverse=True)


def _on_blocks(node: ir.Pred, n: int, size: int, *, causal: bool) -> Hops:
    edges = np.unique([*range(0, n, size), *special_cuts(node, n), n])
    starts, lengths = edges[:-1], np.diff(edges)
    num = len(starts)
    at = _blocks(node, n, starts, lengths)
    inner = _inside(node, starts, lengths) if causal else (1, 1)
    target = np.tri(num, k=-1, dtype=bool) if causal else np.ones((num, num), bool)
    weight = (target * np.outer(lengths, lengths)).astype(np.float64)
    total = n * (n + 1) / 2 if causal else float(n) * n
    rest = 1 - weight.sum() / total  # the pairs within a block, if they count apart

    def share(state: tuple[np.ndarray, ...]) -> float:
        return float(weight[state[0]].sum() / total)

    def done(state: tuple[np.ndarray, ...]) -> bool:
        return bool((state[0] | ~target).all())

    least, upper = search(
        Doubling((at.some,), lambda a, b: (product(a[0], b[0]),), done, share)
    )
    if least is None or inner[0] is None:
        return Hops(None, None, shares({}, upper, rest))
    most, lower = search(Doubling((at.all, at.rows, at.columns), _further, done, share))
    if most is not None:
        most = None if inner[1] is None else max(most, inner[1])
    return Hops(max(least, inner[0]), most, shares(lower, upper, rest))


def _further(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> tuple:
    """The blocks with all pairs after i + j hops, from those after i and after j.

    A block is full if each of its queries reaches in j hops some key from which all
    keys are reached in i hops; or likewise from the side of the keys.
    """
    full = a[0] | product(b[1], a[0]) | product(a[0], b[2])
    return full, product(a[1], b[1]), product(a[2], b[2])


def _both(a: Hops, b: Hops) -> Hops:
    """The tighter bounds from two block sizes."""
    if a.least is None or b.least is None:
        return a if a.least is None else b
    bounds = [x.most for x in (a, b) if x.most is not None]
    most = min(bounds, default=None)
    finer = b if b.exact or not a.exact else a
    return Hops(max(a.least, b.least), most, finer.reach)


def _inside(
    node: ir.Pred, starts: np.ndarray, lengths: np.ndarray
) -> tuple[int | None, int | None]:
    """Bounds of the hops in the diagonal blocks of a causal map: paths stay inside.

    The first is None if some pair is never reached. The second is None if the blocks
    have too many pairs to look at: then all that is known is that a hop is needed.
    """
    if int((lengths.astype(np.int64) ** 2).sum()) > MOST_PAIRS:
        return 1, None
    inner = np.arange(lengths.max())
    different = {}
    for start, length in zip(starts, lengths, strict=True):
        q = start + np.minimum(inner, length - 1)
        pairs = evaluate(node, NumPy(q[:, None], q[None, :]))
        pairs = pairs | (q[:, None] == q[None, :])
        different[pairs.tobytes()] = pairs
    found = search(on_pairs(np.stack([*different.values()]), causal=True))[0]
    return found, found


def _blocks(
    node: ir.Pred, n: int, starts: np.ndarray, lengths: np.ndarray
) -> BlockGraph:
    num = len(starts)
    lasts = starts + lengths - 1
    q, k = np.divmod(np.arange(num * num), num)
    at = Rectangles(starts[q], lasts[q], starts[k], lasts[k])
    verdict = Analysis(Ranges(at))(node)
    some, full = ~verdict.none, verdict.all.copy()
    # Interval analysis decides most blocks; only the others are evaluated.
    open_ = np.flatnonzero(~verdict.none & ~(verdict.all | verdict.hit & verdict.miss))
    rest = Rectangles(*(x[open_] for x in at))
    some[open_], full[open_] = settle(node, node, rest, budget=None)
    some, full = some.reshape(num, num), full.reshape(num, num)
    own = np.eye(num, dtype=bool)
    rows, columns = full | own, full | own
    i, j = np.nonzero(some & ~full)
    if lengths[i].sum() + lengths[j].sum() <= MOST_ROWS:
        node = in_finite(node, n)
        rows[i, j] |= _each_row(node, starts, lengths, i, j)
        columns[i, j] |= _each_row(ir.transpose(node), starts, lengths, j, i)
    return BlockGraph(some | own, full, rows, columns)


def _each_row(
    node: ir.Pred, starts: np.ndarray, lengths: np.ndarray, i: np.ndarray, j: np.ndarray
) -> np.ndarray:
    """Whether every query of block row ``i`` has a key in block column ``j``."""
    if not len(i):
        return np.zeros(0, bool)
    start, last = ir.Operand(" start", ()), ir.Operand(" last", ())
    keys = ir.substitute(node, {"k": ir.Add(start, MIDDLE)})
    try:
        held = simplify(exists(keys, MIDDLE, last))
    except NotImplementedError:
        return np.zeros(len(i), bool)
    count = lengths[i]
    first = np.cumsum(count) - count
    q = np.arange(count.sum()) - np.repeat(first - starts[i], count)
    of_row = {start: starts[j], last: lengths[j] - 1}
    env: dict[ir.Expr, np.ndarray] = {ir.Q: q}
    env |= {x: np.repeat(v, count) for x, v in of_row.items()}
    return np.logical_and.reduceat(values_of(held, env), first)
