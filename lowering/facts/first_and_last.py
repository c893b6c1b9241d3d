"""Finds the first and last key of each query, and the first and last query of a key.

Elimination is used where it is exact, else a walk over the blocks of a plan.
"""

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify
from lowering.planning import BlockSizes, plan
from lowering.ranges.verify import index_range
from lowering.solve.eliminate import extremes

# The block size of the walk, and how many blocks are evaluated at once.
BLOCK = 64
CHUNK = 1024


def first_and_last(node: ir.Pred, x: ir.Var, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest ``x`` for each position of the other side.

    Args:
      node: a predicate of ``q`` and ``k`` only; ``n`` is resolved.
      x: ``q`` or ``k``.
      n: the number of queries, and of keys.

    Returns:
      Two int arrays ``[n]``; -1 where no position fulfils the node.
    """
    finite = in_finite(node, n)
    try:
        return extremes(finite, x, n - 1, np.arange(n))
    except NotImplementedError:
        pass
    return _walk(simplify(ir.transpose(finite) if x == ir.Q else finite), n)


def in_finite(node: ir.Pred, n: int) -> ir.Pred:
    """The node with tests for powers of two as finite sets, for ``n`` positions."""

    def rule(part: ir.Node) -> ir.Node | None:
        if isinstance(part, ir.PowerOfTwo):
            _, high = index_range(part.expr, n, n)
            powers = tuple(1 << i for i in range(max(high, 0).bit_length()))
            return ir.In(part.expr, powers)
        return part if isinstance(part, ir.Expr) else None

    return ir.rewrite(node, rule)


def _walk(node: ir.Pred, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest key of each query, from the ends of its blocks."""
    mask = plan((node,), (0,), BlockSizes(n, n, BLOCK, BLOCK), exact=True)
    length = np.asarray(mask.run_stop) - np.asarray(mask.run_start)
    total = np.concatenate([[0], np.cumsum(length)])
    ends = total[np.asarray(mask.row_ptr)]
    columns = np.repeat(np.asarray(mask.run_start) - total[:-1], length)
    columns = columns + np.arange(len(columns))
    least = _from(node, n, columns, ends[:-1], ends[1:], 1)
    greatest = _from(node, n, columns, ends[:-1], ends[1:], -1)
    return least, greatest


def _from(
    node: ir.Pred, n: int, columns: np.ndarray, first: np.ndarray, stop: np.ndarray,
    step: int,
) -> np.ndarray:  # fmt: skip
    """The first key of every query, by a walk over the blocks of its row.

    ``first`` and ``stop`` are the range of each row in ``columns``; with ``step=-1``
    the walk goes backwards, and finds the last keys.
    """
    rows = np.arange(len(first))
    found = np.full((len(first), BLOCK), -1)
    at = first.copy() if step > 0 else stop - 1
    open_ = first < stop
    inside = rows[:, None] * BLOCK + np.arange(BLOCK) < n
    while open_.any():
        for part in np.array_split(rows[open_], -(-open_.sum() // CHUNK)):
            key = _first_key(node, n, part, columns[at[part]], step)
            found[part] = np.where(found[part] < 0, key, found[part])
        at += step
        missing = ((found < 0) & inside).any(axis=1)
        open_ &= missing & (at >= first) & (at < stop)
    return found.ravel()[:n]


def _first_key(
    node: ir.Pred, n: int, rows: np.ndarray, columns: np.ndarray, step: int
) -> np.ndarray:
    """The first (last, if ``step < 0``) key that each query has in one block, or -1."""
    q = (rows[:, None] * BLOCK + np.arange(BLOCK))[:, :, None]
    k = (columns[:, None] * BLOCK + np.arange(BLOCK)[::step])[:, None, :]
    held = evaluate(node, NumPy(np.minimum(q, n - 1), np.minimum(k, n - 1)))
    held = np.broadcast_to(held, (len(rows), BLOCK, BLOCK)) & (k < n)
    place = held.argmax(axis=2)
    key = np.take_along_axis(np.broadcast_to(k, held.shape), place[..., None], 2)
    return np.where(held.any(axis=2), key[..., 0], -1)
