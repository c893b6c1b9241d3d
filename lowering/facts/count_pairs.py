"""Counts the pairs that a predicate selects, exactly, without evaluating each of them.

If the predicate depends on ``q - k`` alone, diagonals are counted. If it can be solved
for one side, each position of the other side selects a union of intervals and residue
classes, whose sizes are added. If it reads digits of positions, the pairs of one digit
fall into few classes by the predicate that remains, and each class is counted once. All
other predicates are counted by the descent of ``ranges.refine``.
"""

from collections import Counter
from math import lcm
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify
from lowering.facts.first_and_last import in_finite
from lowering.ranges.ranges import Rectangles
from lowering.ranges.refine import count_within
from lowering.solve.by_level import Level, as_pairs, classes, in_levels, levels_of
from lowering.solve.eliminate import interval
from lowering.solve.solve import Branch, depends, solve

# At most so many pairs are evaluated one by one, and so many numbers held at once.
DENSE = 1 << 18
CHUNK = 1 << 19
# At most so many residue classes of a common modulus stand for a union.
MOST_RESIDUES = 128


def count_pairs(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int:
    """How many pairs of the positions the node selects, exactly.

    Args:
      node: a predicate in normal form of ``q`` and ``k`` only: heads and ``n`` are
        resolved, and it reads no run-time array.
      q_seq_len, kv_seq_len: the numbers of queries and of keys.
    """
    found = count_by_form(node, q_seq_len, kv_seq_len)
    if found is not None:
        return found
    ends = (0, q_seq_len - 1, 0, kv_seq_len - 1)
    return count_within(node, Rectangles(*(np.array([x]) for x in ends)))


def count_by_form(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int | None:
    """``count_pairs`` by the rules for forms of predicates, or None if none applies."""
    if isinstance(node, ir.Bool):
        return int(node.value) * q_seq_len * kv_seq_len
    if q_seq_len * kv_seq_len <= DENSE:
        return _count_dense(node, q_seq_len, kv_seq_len)
    found = count_on_diagonals(node, q_seq_len, kv_seq_len)
    if found is not None:
        return found
    node = _without_order(node, q_seq_len, kv_seq_len)
    node = simplify(in_finite(node, max(q_seq_len, kv_seq_len)))
    for rule in (count_by_branches, count_by_levels):
        found = rule(node, q_seq_len, kv_seq_len)
        if found is not None:
            return found
    return None


def _count_dense(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int:
    q, k = np.arange(q_seq_len)[:, None], np.arange(kv_seq_len)[None, :]
    held = evaluate(node, NumPy(q, k))
    return int(np.broadcast_to(held, (q_seq_len, kv_seq_len)).sum())


def _without_order(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> ir.Pred:
    """The node with positions for the entries of a permutation.

    It selects as many pairs: a permutation only changes which position is which.
    """
    for x, length in ((ir.Q, q_seq_len), (ir.K, kv_seq_len)):
        tables = {n for n in ir.walk(node) if isinstance(n, ir.Table) and n.index == x}
        if len(tables) != 1:
            continue
        (table,) = tables
        alone = not depends(ir.replace(node, {table: ir.Const(0)}), x)
        if alone and sorted(table.values[:length]) == list(range(length)):
            node = ir.replace(node, {table: x})
    return simplify(node)


# --- diagonals ---


def count_on_diagonals(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int | None:
    """The pairs of a node of ``q - k`` alone, in linear time, else None."""
    difference = _of_difference(node)
    if difference is None:
        return None
    d = np.arange(1 - kv_seq_len, q_seq_len)[:, None]
    length = np.minimum(q_seq_len, kv_seq_len + d) - np.maximum(0, d)
    held = evaluate(difference, NumPy(d, np.zeros_like(d)))
    return int(length[np.broadcast_to(held, d.shape)].sum())


def _of_difference(node: ir.Node) -> ir.Node | None:
    """``node`` with ``q`` for ``q - k``, or None if it reads anything else."""
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
    return ir.with_children(node, parts)


# --- solved for one side ---


class _Parts(NamedTuple):
    """Intervals that each row selects: ends ``[parts, rows]``; empty if first > last.

    With a modulus, a part is every ``modulus``-th position from first to last.
    """

    first: np.ndarray
    last: np.ndarray


def count_by_branches(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int | None:
    """The pairs of a node that can be solved for ``k`` or ``q``, else None."""
    sides = ((ir.K, kv_seq_len, ir.Q, q_seq_len), (ir.Q, q_seq_len, ir.K, kv_seq_len))
    for x, length, other, count in sides:
        try:
            branches = solve(node, x)
        except NotImplementedError:
            continue
        width = _width(branches)
        if width is None:
            continue
        rows = max(1, CHUNK // max(width, 1))
        return sum(
            _count_union(branches, length, other, np.arange(i, min(i + rows, count)))
            for i in range(0, count, rows)
        )
    return None


def _width(branches: tuple[Branch, ...]) -> int | None:
    """The number of parts of a row, or None if there are too many residue classes.

    A class of a modulus is written as several classes of the common modulus.
    """
    moduli = [b.residue[1] for b in branches if b.residue is not None]
    common = lcm(*moduli)
    found = sum(common // s for s in moduli)
    return None if found > MOST_RESIDUES else len(branches) - len(moduli) + found


def _count_union(
    branches: tuple[Branch, ...], length: int, other: ir.Var, rows: np.ndarray
) -> int:
    """How many positions below ``length`` some branch selects, summed over ``rows``."""
    last = ir.Const(length - 1)
    plain, lattices = [], []
    for branch in branches:
        ends = _Parts(*interval(branch, last, {other: rows}))
        if branch.residue is None:
            plain.append(ends)
        else:
            lattices.append((ends, branch.residue[1]))
    whole = _apart(_stacked(plain, len(rows)))
    total = int(_sizes(whole).sum())
    if not lattices:
        return total
    modulus = lcm(*(s for _, s in lattices))
    points = _stacked(
        [_Parts(ends.first + i * s, ends.last) for ends, s in lattices
         for i in range(modulus // s)],
        len(rows),
    )  # fmt: skip
    return total + _count_outside(points, modulus, length, whole)


def _stacked(parts: list[_Parts], count: int) -> _Parts:
    if not parts:
        none = np.zeros((0, count), np.int64)
        return _Parts(none, none)
    return _Parts(*(np.stack(x) for x in zip(*parts, strict=True)))


def _sizes(parts: _Parts) -> np.ndarray:
    return np.maximum(parts.last - parts.first + 1, 0)


def _apart(parts: _Parts) -> _Parts:
    """The same positions as disjoint parts.

    Parts are sorted by their first position, and each drops what those before it cover.
    An empty part ends before those after it begin.
    """
    order = np.argsort(parts.first, axis=0)
    first, last = (np.take_along_axis(x, order, axis=0) for x in parts)
    reach = np.maximum.accumulate(last, axis=0)
    first[1:] = np.maximum(first[1:], reach[:-1] + 1)
    return _Parts(first, last)


def _count_outside(points: _Parts, modulus: int, length: int, whole: _Parts) -> int:
    """Points of residue classes, each once, that lie in none of the whole parts."""
    residue = points.first % modulus
    # The classes one after the other, with a gap: there, points are neighbours.
    base = residue * (length // modulus + 2)
    first = base + points.first // modulus
    last = base + (points.last - residue) // modulus
    order = np.argsort(first, axis=0)
    residue, base = (np.take_along_axis(x, order, axis=0) for x in (residue, base))
    single = _apart(_Parts(first, last))
    total = int(_sizes(single).sum())
    # In each class, the points of a whole part are again a range.
    for start, stop in zip(*whole, strict=True):
        low = np.maximum(single.first - base, -((residue - start) // modulus))
        high = np.minimum(single.last - base, (stop - residue) // modulus)
        total -= int(_sizes(_Parts(low, high)).sum())
    return total


# --- digit by digit ---


def count_by_levels(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> int | None:
    """The pairs of a node whose tests read one digit each, else None."""
    try:
        return _count_levels(*in_levels(node, q_seq_len, kv_seq_len))
    except NotImplementedError:
        return None


def _count_levels(node: ir.Pred, levels: tuple[Level, ...]) -> int:
    """The pairs of digits of these levels that fulfil a node.

    Raises:
      NotImplementedError: digits have too many values, or leave too many classes.
    """
    read = levels_of(node, levels)
    free = 1
    for level in levels:
        free *= 1 if level in read else level.size
    if isinstance(node, ir.Bool):
        return free * int(node.value)
    if len(read) == 1:
        (level,) = read
        return free * count_pairs(as_pairs(node, level), level.num_q, level.num_k)
    level = min(read, key=lambda x: x.size)
    found: Counter[ir.Pred] = Counter()
    for rest, count in classes(node, level, levels):
        found[rest] += count
    others = tuple(x for x in read if x != level)
    return free * sum(c * _count_levels(rest, others) for rest, c in found.items())
