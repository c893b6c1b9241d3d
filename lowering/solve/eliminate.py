"""Eliminates a position from a predicate: does one exist, which is first, which last?

The predicate is solved for one unknown at a time (``solve``). If it reads a position by
digits (rows and columns of a grid, number and place of a block), each digit is an
unknown of its own. Each rule below has its formula above it.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import lcm
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import integer, simplify
from lowering.expr.static_range import Span, span
from lowering.solve.solve import (
    Bound,
    Branch,
    Unknown,
    ceil_div,
    depends,
    linear,
    minus,
    name_of,
    solve,
)

# The position j of a @ b. No identifier: no operand of a user has this name.
MIDDLE = ir.Operand(" j", ())


class Digits(NamedTuple):
    """A predicate of the digits of a position: position = sum of weight * digit.

    Digits are sorted from the lowest on; a digit takes the values 0 .. its ``last``.
    """

    node: ir.Pred
    names: tuple[ir.Operand, ...]
    weights: tuple[int, ...]
    last: tuple[ir.Expr, ...]


def exists(node: ir.Pred, x: Unknown, last: ir.Expr) -> ir.Pred:
    """The predicate "some ``x`` in 0 .. ``last`` fulfils ``node``", without ``x``.

    Args:
      node: a predicate whose heads are resolved; ``q`` and ``k`` are at least 0, and
        ``k`` is below ``n``.
      x: the unknown to eliminate.
      last: an expression without ``x``.

    Raises:
      NotImplementedError: no exact rule covers a part; the message names it.
    """
    last = _extent(node, x, last)
    return _exists(simplify(node), x, last)


def extremes(
    node: ir.Pred, x: ir.Var, last: int, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest ``x`` in 0 .. ``last`` for each value of the other.

    Args:
      node: a predicate of ``q`` and ``k``; heads and ``n`` are resolved.
      x: ``q`` or ``k``; the other one takes ``values``.
      last: the last position.
      values: int ``[count]``.

    Returns:
      Two int arrays ``[count]``; -1 where no ``x`` fulfils the node.

    Raises:
      NotImplementedError: no exact rule covers some part.
    """
    end = _extent(node, x, ir.Const(last))
    node = simplify(node)
    other = ir.Q if x == ir.K else ir.K
    env: dict[ir.Expr, np.ndarray] = {other: np.asarray(values, np.int64)}
    try:
        branches = solve(node, x)
    except NotImplementedError:
        digits = by_digits(node, x, end)
        if digits is None:
            raise
        return _extremes_by_digit(digits, env)
    return _least(branches, end, env), _greatest(branches, end, env)


def compose(a: ir.Pred, b: ir.Pred) -> ir.Pred:
    """The predicate "``a(q, j)`` and ``b(j, k)`` for some position ``j`` of the keys".

    Maps by head are composed head by head. The checks of lengths that tables and grids
    in ``a`` and ``b`` ask for are kept.

    Raises:
      NotImplementedError: ``j`` cannot be eliminated exactly.
    """
    count = lcm(*(len(n.terms) for n in _by_head(a) + _by_head(b)))
    parts = tuple(
        _compose(_of_head(a, i, count), _of_head(b, i, count)) for i in range(count)
    )
    return parts[0] if count == 1 else ir.ByHead(parts)


def _compose(a: ir.Pred, b: ir.Pred) -> ir.Pred:
    both = ir.And((ir.substitute(a, {"k": MIDDLE}), ir.substitute(b, {"q": MIDDLE})))
    last = ir.Add(ir.N, ir.Const(-1))
    try:
        found = exists(both, MIDDLE, last)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"a @ b: the position j in the middle cannot be eliminated exactly: "
            f"{error}. Exact are windows, offsets, blocks, strides, sinks, grids and "
            "what `&`, `|`, `lift` and `per_head` make of them; for small sizes, "
            "multiply the dense maps"
        ) from error
    # `verify` looks for tables and extents in a node: keep those of j, as ones of k.
    checks = [
        ir.Eq(kept, kept)
        for part in dict.fromkeys(ir.walk(both))
        if isinstance(part, ir.Within | ir.Table) and depends(part, MIDDLE)
        for kept in [ir.replace(part, {MIDDLE: ir.K})]
        if ir.axes(kept) <= {"k", "n"}
    ]
    return ir.And((found, *checks)) if checks else found


def _by_head(node: ir.Node) -> list[ir.ByHead]:
    return [n for n in ir.walk(node) if isinstance(n, ir.ByHead)]


def _of_head(node: ir.Pred, head: int, count: int) -> ir.Pred:
    """The node with each ``ByHead`` replaced by the term of ``head``; ``h`` stays."""

    def rule(part: ir.Node) -> ir.Node | None:
        if isinstance(part, ir.ByHead):
            return ir.rewrite(part.terms[head * len(part.terms) // count], rule)
        return None

    return ir.rewrite(node, rule)


def _extent(node: ir.Pred, x: Unknown, last: ir.Expr) -> ir.Expr:
    """``last``, or the last position of a grid that ``x`` has to fill."""
    sizes = {n.size for n in ir.walk(node) if isinstance(n, ir.Within) and n.expr == x}
    return ir.Const(min(sizes) - 1) if sizes else last


# --- existence ---


# exists x: A | B      iff  (exists x: A) | (exists x: B)
# exists x: A & B(x)   iff  A & (exists x: B(x)),  A without x
# exists x: B(digits)  iff  exists x_0: exists x_1: ... B
def _exists(node: ir.Pred, x: Unknown, last: ir.Expr) -> ir.Pred:
    """``exists`` for a node in normal form."""
    if not depends(node, x):
        return simplify(known(ir.And((node, ir.Le(ir.Const(0), last)))))
    if isinstance(node, ir.Or):
        return simplify(ir.Or(tuple(_exists(t, x, last) for t in node.terms)))
    terms = node.terms if isinstance(node, ir.And) else (node,)
    free = tuple(t for t in terms if not depends(t, x))
    bound = simplify(ir.And(tuple(t for t in terms if depends(t, x))))
    try:
        parts = [_branch_exists(b, last) for b in solve(bound, x)]
        found = simplify(ir.Or(tuple(parts)))
    except NotImplementedError:
        digits = by_digits(bound, x, last)
        if digits is None:
            raise
        found = digits.node
        for name, end in zip(digits.names, digits.last, strict=True):
            found = _exists(found, name, end)
    return simplify(ir.And((*free, found)))


# Some x is between all bounds  iff  one is between each lower and each upper bound.
def _branch_exists(branch: Branch, last: ir.Expr) -> ir.Pred:
    lowers = ((ir.Const(0), 1), *branch.lowers)
    uppers = ((last, 1), *branch.uppers)
    meets = [_meets(a, b, branch.residue) for a in lowers for b in uppers]
    return known(simplify(ir.And((*branch.conditions, *meets))))


# Some x has a <= m x, w x <= b, x = r (mod s)  iff  w first <= b, where
#   first = c + (r - c) % s,  c = ceil(a / m)
# Without a residue:  iff  ceil(a / m) <= floor(b / w)
def _meets(low: Bound, high: Bound, residue: Bound | None) -> ir.Pred:
    """Whether an integer, of the residue if there is one, lies between two bounds.

    With several lower bounds, the first integer above all of them is the greatest of
    their first integers. So it is enough to ask for each pair of bounds.
    """
    (a, m), (b, w) = low, high
    if residue is not None:
        r, s = residue
        first = ceil_div(low)
        first = ir.Add(first, ir.Mod(minus(r, first), s))
        return ir.Le(ir.Mul(first, w), b)
    if m == 1:
        return ir.Le(ir.Mul(a, w), b)
    if w == 1:
        return ir.Le(a, ir.Mul(b, m))
    return ir.Le(ceil_div(low), ir.FloorDiv(b, w))


def known(node: ir.Pred) -> ir.Pred:
    """A node in normal form, without comparisons that hold or fail at all positions."""
    match node:
        case ir.And(terms) | ir.Or(terms):
            return simplify(type(node)(tuple(known(t) for t in terms)))
        case ir.Le(left, ir.Const(bound)):
            _, high = _range(left)
            if high is not None and high <= bound:
                return ir.Bool(True)
            _, high = _range(integer(ir.Mul(left, -1)))
            if high is not None and high < -bound:
                return ir.Bool(False)
    return node


# With 0 <= k < n:  n == 1 + (something >= 0)  and  n == k + 1 + (something >= 0)
def _range(expr: ir.Expr) -> Span:
    """Bounds of an expression in normal form, by 0 <= q and 0 <= k < n."""
    terms, constant = linear(expr)
    keys, length = terms.get(ir.K, 0), terms.get(ir.N, 0)
    if keys * length < 0:
        terms = {**terms, ir.K: keys + length}
    low: int | None = constant + length
    high: int | None = low
    for atom, f in terms.items():
        least, most = span(ir.Mul(atom, f))
        low = None if low is None or least is None else low + least
        high = None if high is None or most is None else high + most
    return low, high


# --- digits ---


# x == sum of w_i x_i for weights 1 = w_0 | w_1 | ...;  for weights a and a b:
#   x // a == sum of (w_i / a) x_i over w_i >= a;  x % b == the digits below b
#   x // a % b == the digits from a below a b
def by_digits(
    node: ir.Pred, x: Unknown, last: ir.Expr, cuts: Iterable[int] = ()
) -> Digits | None:
    """The node with ``x`` written in digits, or None if it divides ``x`` nowhere."""
    size = last.value + 1 if isinstance(last, ir.Const) else None
    cuts = {*cuts, *cuts_of(node, x)} - {size}
    whole = {c for c in cuts if size is not None and size % c == 0}
    weights = [1]
    for cut in sorted(whole or cuts):
        if cut > weights[-1] and cut % weights[-1] == 0:
            weights.append(cut)
    if len(weights) == 1:
        return None
    names = tuple(ir.Operand(f"{name_of(x)} digit {i}", ()) for i in weights)
    ends: list[ir.Expr] = [ir.Const(b // a - 1) for a, b in pairwise(weights)]
    ends.append(integer(ir.FloorDiv(last, weights[-1])))

    def part(start: int, stop: int | None) -> ir.Expr:
        """The digits with ``start <= weight < stop``, in units of ``start``."""
        total: ir.Expr = ir.Const(0)
        for name, w in zip(names, weights, strict=True):
            if w >= start and (stop is None or w < stop):
                total = ir.Add(total, ir.Mul(name, w // start))
        return total

    def rule(child: ir.Node) -> ir.Node | None:
        match child:
            case ir.Mod(ir.FloorDiv(y, a), b) if y == x and {a, a * b} <= {*weights}:
                return part(a, a * b)
            case ir.Mod(ir.FloorDiv(y, a), b) if (
                y == x and a in weights and a * b == size
            ):
                return part(a, None)
            case ir.Mod(y, b) if y == x and b in weights:
                return part(1, b)
            case ir.FloorDiv(y, a) if y == x:
                base = max(w for w in weights if a % w == 0)
                return ir.FloorDiv(part(base, None), a // base)
        return part(1, None) if child == x else None

    new = ir.rewrite(node, rule)
    if size is None or size % weights[-1]:
        new = ir.And((new, ir.Le(part(1, None), last)))
    return Digits(simplify(new), names, tuple(weights), tuple(ends))


def cuts_of(node: ir.Node, x: Unknown) -> set[int]:
    """The weights at which divisions and remainders cut ``x`` into digits."""
    match node:
        case ir.Mod(ir.FloorDiv(y, a), b) if y == x:
            return {a, a * b}
        case ir.FloorDiv(y, a) | ir.Mod(y, a) if y == x:
            return {a}
    return set().union(*(cuts_of(child, x) for child in ir.children(node)))


# --- numbers ---


def values_of(expr: ir.Node, env: Mapping[ir.Expr, np.ndarray]) -> np.ndarray:
    """The values ``[count]`` of a node, from arrays ``[count]`` of its leaves."""
    count = len(next(iter(env.values())))
    columns = {x: v[:, None] for x, v in env.items()}
    none = np.zeros((count, 1), np.int64)
    operands = {x.name: v for x, v in columns.items() if isinstance(x, ir.Operand)}
    at = NumPy(columns.get(ir.Q, none), columns.get(ir.K, none), 0, operands)
    return np.broadcast_to(evaluate(expr, at), (count, 1))[:, 0]


def interval(
    branch: Branch, last: ir.Expr, env: Mapping[ir.Expr, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest ``x`` of one branch; least > greatest if none.

    Args:
      branch: solved for an unknown ``x`` in 0 .. ``last``.
      last: the last value of ``x``.
      env: int arrays ``[count]`` of the variables that the branch reads.

    Returns:
      Two int arrays ``[count]``; both have the residue of the branch, if it has one.
    """
    low = values_of(ir.Const(0), env)
    for expr, m in branch.lowers:
        low = np.maximum(low, -(-values_of(expr, env) // m))
    high = values_of(last, env)
    for expr, m in branch.uppers:
        high = np.minimum(high, values_of(expr, env) // m)
    if branch.residue is not None:
        r, s = branch.residue
        residue = values_of(r, env)
        low, high = low + (residue - low) % s, high - (high - residue) % s
    allowed = values_of(ir.And((ir.Bool(True), *branch.conditions)), env)
    return low, np.where(allowed, high, -1)


NONE = np.iinfo(np.int64).max


def _least(
    branches: tuple[Branch, ...], last: ir.Expr, env: Mapping[ir.Expr, np.ndarray]
) -> np.ndarray:
    found = np.full_like(values_of(ir.Const(0), env), NONE)
    for branch in branches:
        low, high = interval(branch, last, env)
        found = np.where(low <= high, np.minimum(found, low), found)
    return np.where(found == NONE, -1, found)


def _greatest(
    branches: tuple[Branch, ...], last: ir.Expr, env: Mapping[ir.Expr, np.ndarray]
) -> np.ndarray:
    found = np.full_like(values_of(ir.Const(0), env), -1)
    for branch in branches:
        low, high = interval(branch, last, env)
        found = np.where(low <= high, np.maximum(found, high), found)
    return found


def _extremes_by_digit(
    digits: Digits, env: Mapping[ir.Expr, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """``extremes`` by digits: the highest digit is chosen first.

    A value of a digit counts only if some values of the lower digits go with it.
    """
    levels = [digits.node]
    for name, end in zip(digits.names[:-1], digits.last[:-1], strict=True):
        levels.append(_exists(levels[-1], name, end))
    found = []
    for pick in (_least, _greatest):
        known = dict(env)
        total = np.zeros_like(next(iter(env.values())))
        nothing = np.zeros(len(total), bool)
        for level, name, weight, end in list(
            zip(levels, digits.names, digits.weights, digits.last, strict=True)
        )[::-1]:
            chosen = pick(solve(level, name), end, known)
            nothing |= chosen < 0
            known[name] = np.maximum(chosen, 0)
            total = total + known[name] * weight
        found.append(np.where(nothing, -1, total))
    return found[0], found[1]
