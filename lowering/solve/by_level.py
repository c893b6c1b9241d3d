"""Rewrites a predicate into tests that each read one digit of the query and the key.

A level is one digit of the query and the digit of the key with the same weight. A
comparison of positions becomes a comparison of their highest digits and, where these
are equal, one of the lower digits.
"""

from collections.abc import Callable, Iterator
from math import gcd
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify, sum_of
from lowering.expr.static_range import span
from lowering.solve.eliminate import by_digits, cuts_of
from lowering.solve.solve import from_linear

# At most so many pairs of digits of one level are tried, and make so many classes.
MOST_TRIED = 1 << 20
MOST_CLASSES = 256
# At most so many tests: the results of all fit one int64, a bit each.
MOST_TESTS = 62
# At most so many values of the higher digit for which the lower digits decide.
MOST_CARRIES = 8


class Level(NamedTuple):
    """The digits of one weight: their names, and how many values each can take."""

    q: ir.Operand
    k: ir.Operand
    num_q: int
    num_k: int

    @property
    def size(self) -> int:
        """The number of pairs of digits."""
        return self.num_q * self.num_k


def in_levels(
    node: ir.Pred, q_seq_len: int, kv_seq_len: int
) -> tuple[ir.Pred, tuple[Level, ...]]:
    """A predicate as tests of one level each, and the levels, the lowest first.

    Raises:
      NotImplementedError: the predicate reads no digits, or mixes them in one test.
    """
    cuts = cuts_of(node, ir.Q) | cuts_of(node, ir.K)
    by_q = by_digits(node, ir.Q, ir.Const(q_seq_len - 1), cuts)
    by_k = by_digits(by_q.node, ir.K, ir.Const(kv_seq_len - 1), cuts) if by_q else None
    if by_q is None or by_k is None or by_q.weights != by_k.weights:
        raise NotImplementedError("queries and keys are not read by the same digits")
    sides = zip(by_q.names, by_k.names, by_q.last, by_k.last, strict=True)
    levels = tuple(Level(q, k, _count(a), _count(b)) for q, k, a, b in sides)
    return simplify(_apart(by_k.node, levels)), levels


def _count(last: ir.Expr) -> int:
    assert isinstance(last, ir.Const)
    return last.value + 1


def levels_of(node: ir.Node, levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The levels whose digits the node reads."""
    names = {*ir.operand_names(node)}
    return tuple(x for x in levels if {x.q.name, x.k.name} & names)


def as_pairs(node: ir.Pred, level: Level) -> ir.Pred:
    """A node that reads one level, with ``q`` and ``k`` for the digits there."""
    return simplify(ir.replace(node, {level.q: ir.Q, level.k: ir.K}))


# --- tests of one level ---


def _apart(node: ir.Pred, levels: tuple[Level, ...]) -> ir.Pred:
    """A node in normal form as tests of one level each."""

    def rule(part: ir.Pred) -> ir.Pred | None:
        if len(levels_of(part, levels)) <= 1:
            return part
        match part:
            case ir.And() | ir.Or() | ir.Not():
                return None
            case ir.Le(left, ir.Const(bound)):
                return _compared(left, bound, levels, equal=False)
            case ir.Eq(left, ir.Const(bound)):
                return _compared(left, bound, levels, equal=True)
            case ir.In(expr, values) if len(values) <= MOST_TESTS:
                tests = [simplify(ir.Eq(expr, ir.Const(value))) for value in values]
                return ir.Or(tuple(_apart(test, levels) for test in tests))
        raise NotImplementedError("a test mixes digits of several levels")

    return ir.rewrite(node, rule)


# w h + l <= c, for least <= l <= most and surely = (c - most) // w:
#   h <= surely | (h == v & l <= c - w v) for v in surely + 1 .. (c - least) // w
# w h + l == c:  (h == v & l == c - w v) for v in surely .. (c - least) // w
def _compared(
    left: ir.Expr, bound: int, levels: tuple[Level, ...], *, equal: bool
) -> ir.Pred:
    """``left <= bound``, or ``left == bound``, split at the level that weighs most."""
    total, constant = sum_of(left)
    parts: dict[Level, dict[ir.Expr, int]] = {}
    for atom, factor in total.items():
        read = levels_of(atom, levels)
        if len(read) != 1:
            raise NotImplementedError("a number mixes digits of several levels")
        parts.setdefault(read[0], {})[atom] = factor
    weights = {level: gcd(*terms.values()) for level, terms in parts.items()}
    top = max(weights, key=weights.__getitem__)
    weight = weights.pop(top)
    high = from_linear({x: f // weight for x, f in parts[top].items()}, 0)
    rest = {x: f for level in weights for x, f in parts[level].items()}
    low = from_linear(rest, constant)
    least, most = _range(low, levels)
    surely, last = (bound - most) // weight, (bound - least) // weight
    if last - surely > MOST_CARRIES:
        raise NotImplementedError("digits overlap")
    kind = ir.Eq if equal else ir.Le
    found: list[ir.Pred] = [] if equal else [ir.Le(high, ir.Const(surely))]
    for value in range(surely if equal else surely + 1, last + 1):
        test = simplify(kind(low, ir.Const(bound - weight * value)))
        found.append(ir.And((ir.Eq(high, ir.Const(value)), _apart(test, levels))))
    return simplify(ir.Or(tuple(found)))


def _range(expr: ir.Expr, levels: tuple[Level, ...]) -> tuple[int, int]:
    """Least and greatest value of an expression of digits."""
    new: dict[ir.Node, ir.Expr] = {}
    for level in levels:
        new[level.q] = ir.Mod(level.q, level.num_q)
        new[level.k] = ir.Mod(level.k, level.num_k)
    low, high = span(ir.replace(expr, new))
    if low is None or high is None:
        raise NotImplementedError("a number is not bounded by its digits")
    return low, high


# --- classes of one level ---


def classes(
    node: ir.Pred, level: Level, levels: tuple[Level, ...]
) -> Iterator[tuple[ir.Pred, int]]:
    """The distinct predicates that remain once one level is fixed, with their counts.

    Each pair of digits of ``level`` fixes the tests that read it. Pairs that fix all
    tests alike form a class: it yields the remaining predicate and the class size.

    Raises:
      NotImplementedError: there are too many pairs, tests or classes.
    """
    tests: dict[ir.Pred, int] = {}

    def note(test: ir.Pred) -> ir.Pred:
        tests.setdefault(test, len(tests))
        return test

    _filled(node, level, levels, note)
    if level.size > MOST_TRIED or len(tests) > MOST_TESTS:
        raise NotImplementedError("a digit has too many values, or too many tests")
    q, k = np.arange(level.num_q)[:, None], np.arange(level.num_k)[None, :]
    at = NumPy(q, k, 0, {level.q.name: q, level.k.name: k})
    codes = np.zeros((level.num_q, level.num_k), np.int64)
    for test, bit in tests.items():
        codes |= np.asarray(evaluate(test, at), np.int64) << bit
    values, counts = np.unique(codes, return_counts=True)
    if len(values) > MOST_CLASSES:
        raise NotImplementedError("pairs of a digit fall into too many classes")
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):

        def held(test: ir.Pred, value: int = value) -> ir.Pred:
            return ir.Bool(bool(value >> tests[test] & 1))

        yield simplify(_filled(node, level, levels, held)), count


def _filled(
    node: ir.Pred,
    level: Level,
    levels: tuple[Level, ...],
    change: Callable[[ir.Pred], ir.Pred],
) -> ir.Pred:
    """The node with ``change`` applied to the largest parts that read this level."""
    read = levels_of(node, levels)
    if level not in read:
        return node
    if len(read) == 1:
        return change(node)
    match node:
        case ir.And(terms) | ir.Or(terms):
            kind = type(node)
            own = tuple(t for t in terms if levels_of(t, levels) == (level,))
            others = [_filled(t, level, levels, change) for t in terms if t not in own]
            return kind((*others, change(kind(own)))) if own else kind(tuple(others))
        case ir.Not(term):
            return ir.Not(_filled(term, level, levels, change))
    raise AssertionError("tests read one level each")
