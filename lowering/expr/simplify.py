"""Simplifies a node to a normal form, which is smaller and easier to bound.

An integer becomes a sum of atoms with coefficients, and a comparison becomes
``sum <= constant``. Negations move inwards to the comparisons. Inside ``&`` and ``|``,
bounds on the same sum merge. Each rule below has its formula above it.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import gcd
from typing import assert_never

from lowering import ir
from lowering.expr.printing import sort_key
from lowering.expr.static_range import span

# Coefficients by atom: a variable, quotient, remainder, minimum, look-up ...
Sum = Mapping[ir.Expr, int]
# The passes ask about the same parts again and again.
REMEMBERED = 1 << 14


@lru_cache(maxsize=REMEMBERED)
def simplify(node: ir.Pred) -> ir.Pred:
    """An equal predicate in normal form; heads stay as they are."""
    match node:
        case ir.Bool() | ir.HoistedBits():
            return node
        case ir.Le(a, b):
            return _le(a, b)
        case ir.Eq(a, b):
            return _eq(a, b)
        case ir.In(a, values):
            return _in(a, values)
        case ir.PowerOfTwo(a):
            return _power_of_two(integer(a))
        case ir.And(terms):
            return _all([simplify(t) for t in terms])
        case ir.Or(terms):
            return _any([simplify(t) for t in terms])
        case ir.Not(term):
            return _negate(simplify(term))
        case ir.ByHead(terms):
            return ir.ByHead(tuple(simplify(t) for t in terms))
    assert_never(node)


# --- integers: sums of atoms ---


def integer(node: ir.Expr) -> ir.Expr:
    """An equal expression in normal form."""
    return build(*sum_of(node))


@lru_cache(maxsize=REMEMBERED)
def sum_of(node: ir.Expr) -> tuple[Sum, int]:
    """The expression as nonzero coefficients of atoms, and a constant."""
    match node:
        case ir.Const(value):
            return {}, value
        case ir.Add(a, b):
            return _plus(sum_of(a), sum_of(b))
        case ir.Mul(a, n):
            return _scale(sum_of(a), n)
        case ir.FloorDiv(a, n):
            return _floor_div(sum_of(a), n)
        case ir.Mod(a, n):
            return _mod(sum_of(a), n)
        case ir.Min(a, b) | ir.Max(a, b):
            return _pick(type(node), sum_of(a), sum_of(b))
        case ir.Log2(a):  # floor_log2(c) == max(c, 1).bit_length() - 1
            a = integer(a)
            if isinstance(a, ir.Const):
                return {}, max(a.value, 1).bit_length() - 1
            return {ir.Log2(a): 1}, 0
        case ir.Within(a, _):
            return sum_of(a)
        case ir.Table(values, index):  # table[c] == values[c]
            index = integer(index)
            if isinstance(index, ir.Const) and 0 <= index.value < len(values):
                return {}, values[index.value]
            return {ir.Table(values, index): 1}, 0
        case ir.Operand(name, index):
            return {ir.Operand(name, tuple(integer(i) for i in index)): 1}, 0
        case ir.Var() | ir.Hoisted():
            return {node: 1}, 0
    assert_never(node)


def _plus(a: tuple[Sum, int], b: tuple[Sum, int], sign: int = 1) -> tuple[Sum, int]:
    total = dict(a[0])
    for atom, factor in b[0].items():
        total[atom] = total.get(atom, 0) + sign * factor
    return {x: f for x, f in total.items() if f}, a[1] + sign * b[1]


def _scale(a: tuple[Sum, int], n: int) -> tuple[Sum, int]:
    return ({x: f * n for x, f in a[0].items()} if n else {}), a[1] * n


# (n x + y) // n == x + y // n
# (n c + d + y) // n == c + (d + y) // n,  0 <= d < n
# y // n == low // n  if low <= y <= high and low // n == high // n
def _floor_div(a: tuple[Sum, int], n: int) -> tuple[Sum, int]:
    """``a // n``: multiples of ``n`` leave the division, the rest stays inside."""
    whole = {x: f // n for x, f in a[0].items() if f % n == 0}
    rest = {x: f for x, f in a[0].items() if f % n}
    outside = whole, a[1] // n
    if not rest:
        return outside
    inner = build(rest, a[1] % n)
    quotient: tuple[Sum, int]
    low, high = span(inner)
    if low is not None and high is not None and low // n == high // n:
        return _plus(outside, ({}, low // n))
    match inner:
        case ir.FloorDiv(e, m):  # floor(floor(e / m) / n) == floor(e / (m n))
            quotient = _floor_div(sum_of(e), m * n)
        case _:
            quotient = {ir.FloorDiv(inner, n): 1}, 0
    return _plus(outside, quotient)


# (f x + c) % n == ((f % n) x + c % n) % n
# y % n == y - n (low // n)  if low <= y <= high and low // n == high // n
# (y % m) % n == y % m  if m divides n
def _mod(a: tuple[Sum, int], n: int) -> tuple[Sum, int]:
    """``a % n``: multiples of ``n`` vanish, coefficients and constant are reduced."""
    rest = {x: f % n for x, f in a[0].items() if f % n}
    # q - k keeps its sign: -1 reads better than n - 1 and bounds as tightly.
    rest = {x: (f - n if f > n // 2 else f) for x, f in rest.items()}
    if not rest:
        return {}, a[1] % n
    inner = build(rest, a[1] % n)
    low, high = span(inner)
    if low is not None and high is not None and low // n == high // n:
        return _plus(sum_of(inner), ({}, -n * (low // n)))
    if isinstance(inner, ir.Mod) and n % inner.divisor == 0:
        return {inner: 1}, 0
    return {ir.Mod(inner, n): 1}, 0


# min(a, b) == a  if a - b <= 0 always;  min(a, b) == b  if a - b >= 0 always
# max(a, b) == b  if a - b <= 0 always;  max(a, b) == a  if a - b >= 0 always
def _pick(
    kind: type[ir.Min] | type[ir.Max], a: tuple[Sum, int], b: tuple[Sum, int]
) -> tuple[Sum, int]:
    difference, constant = _plus(a, b, -1)
    if not difference:
        first_is_smaller = constant <= 0
        return a if first_is_smaller == (kind is ir.Min) else b
    low, high = span(build(difference, constant))
    if high is not None and high <= 0:
        return a if kind is ir.Min else b
    if low is not None and low >= 0:
        return b if kind is ir.Min else a
    return {kind(build(*a), build(*b)): 1}, 0


def build(total: Sum, constant: int) -> ir.Expr:
    """The sum as an expression: positive factors first, then by name."""
    order = sorted(total.items(), key=lambda xf: (xf[1] < 0, sort_key(xf[0])))
    parts = [x if f == 1 else ir.Mul(x, f) for x, f in order]
    if constant or not parts:
        parts.append(ir.Const(constant))
    built = parts[0]
    for part in parts[1:]:
        built = ir.Add(built, part)
    return built


# --- comparisons: a sum against a constant ---


# a <= b  iff  a - b <= 0
# g x + c <= 0  iff  x <= floor(-c / g),  g the gcd of the coefficients
# x <= c is True if x <= c always, False if x > c always
def _le(a: ir.Expr, b: ir.Expr) -> ir.Pred:
    total, constant = _plus(sum_of(a), sum_of(b), -1)
    if not total:
        return ir.Bool(constant <= 0)
    common = gcd(*total.values())
    total = {x: f // common for x, f in total.items()}
    bound = -constant // common
    low, high = span(build(total, 0))
    if high is not None and high <= bound:
        return ir.Bool(True)
    if low is not None and low > bound:
        return ir.Bool(False)
    match list(total.items()):
        case [(ir.FloorDiv(e, n), 1)]:  # e // n <= b  iff  e <= b n + n - 1
            return _le(e, ir.Const(bound * n + n - 1))
        case [(ir.FloorDiv(e, n), -1)]:  # e // n >= -b  iff  e >= -b n
            return _le(ir.Const(-bound * n), e)
    return ir.Le(build(total, 0), ir.Const(bound))


# a == b  iff  a - b == 0
# g x + c == 0  iff  x == -c / g;  False if g does not divide c
# x == c is False if c is outside of the span of x, True if the span is {c}
def _eq(a: ir.Expr, b: ir.Expr) -> ir.Pred:
    total, constant = _plus(sum_of(a), sum_of(b), -1)
    if not total:
        return ir.Bool(constant == 0)
    common = gcd(*total.values())
    if constant % common:
        return ir.Bool(False)
    total = {x: f // common for x, f in total.items()}
    # One of the two signs, so that equal conditions are equal nodes.
    sign = -1 if total[min(total, key=sort_key)] < 0 else 1
    total = {x: f * sign for x, f in total.items()}
    left, right = build(total, 0), sign * -constant // common
    low, high = span(left)
    if (low is not None and right < low) or (high is not None and right > high):
        return ir.Bool(False)
    if low == high == right:
        return ir.Bool(True)
    if isinstance(left, ir.Mod):
        return _congruent(left, right)
    return ir.Eq(left, ir.Const(right))


# y % n == r  iff  y == first  if low <= y <= high holds one such number, first;
# False if it holds none
def _congruent(left: ir.Mod, right: int) -> ir.Pred:
    """``inner % n == right``, decided by the span of ``inner`` where that is enough."""
    low, high = span(left.expr)
    if low is None or high is None:
        return ir.Eq(left, ir.Const(right))
    first = low + (right - low) % left.divisor
    if first > high:
        return ir.Bool(False)
    if first + left.divisor > high:
        return _eq(left.expr, ir.Const(first))
    return ir.Eq(left, ir.Const(right))


# x + c in S  iff  x in S - c
# x in {v}  iff  x == v;  x in {a, a + 1, ..., b}  iff  a <= x & x <= b
def _in(a: ir.Expr, values: tuple[int, ...]) -> ir.Pred:
    total, constant = sum_of(a)
    shifted = tuple(v - constant for v in values)
    if not total:
        return ir.Bool(0 in shifted)
    if not shifted:
        return ir.Bool(False)
    expr = build(total, 0)
    if len(shifted) == 1:
        return _eq(expr, ir.Const(shifted[0]))
    if shifted[-1] - shifted[0] == len(shifted) - 1:
        low = _le(ir.Const(shifted[0]), expr)
        return _all([low, _le(expr, ir.Const(shifted[-1]))])
    return ir.In(expr, shifted)


def _power_of_two(expr: ir.Expr) -> ir.Pred:
    if isinstance(expr, ir.Const):
        return ir.Bool(expr.value.bit_count() == 1 and expr.value > 0)
    return ir.PowerOfTwo(expr)


# --- conjunctions and disjunctions ---


# ~(a <= b) is b + 1 <= a;  ~(A & B) is ~A | ~B;  ~(A | B) is ~A & ~B;  ~~A is A
def _negate(node: ir.Pred) -> ir.Pred:
    """The negation of a node in normal form, in normal form."""
    match node:
        case ir.Bool(value):
            return ir.Bool(not value)
        case ir.Le(a, b):
            return _le(ir.Add(b, ir.Const(1)), a)
        case ir.And(terms):
            return _any([_negate(t) for t in terms])
        case ir.Or(terms):
            return _all([_negate(t) for t in terms])
        case ir.Not(term):
            return term
        case ir.ByHead(terms):
            return ir.ByHead(tuple(_negate(t) for t in terms))
        case ir.Eq() | ir.In() | ir.PowerOfTwo() | ir.HoistedBits():
            return ir.Not(node)
    assert_never(node)


def _all(terms: list[ir.Pred]) -> ir.Pred:
    return _merge(terms, ir.And, neutral=True)


def _any(terms: list[ir.Pred]) -> ir.Pred:
    return _merge(terms, ir.Or, neutral=False)


# A & A is A;  A & True is A;  A & False is False  (and the same of | with the other)
# x <= a & x <= b  is  x <= min(a, b);  x <= a | x <= b  is  x <= max(a, b)
# A & B  is  A & (B where A holds);  A | B  is  A | (B where A does not hold)
def _merge(
    terms: list[ir.Pred], kind: type[ir.And] | type[ir.Or], *, neutral: bool
) -> ir.Pred:
    """The terms as one node: flattened, without repeats and without implied terms.

    ``neutral`` is True for ``&`` and False for ``|``.
    """
    flat: list[ir.Pred] = []
    for term in terms:
        flat += term.terms if isinstance(term, kind) else (term,)
    best: dict[ir.Pred | ir.Expr, ir.Pred] = {}
    for term in flat:
        if term == ir.Bool(not neutral):
            return term
        if term == ir.Bool(neutral):
            continue
        # Of two bounds on one sum, `&` keeps the lower and `|` the higher.
        key = term.left if isinstance(term, ir.Le) else term
        old = best.get(key)
        if isinstance(term, ir.Le) and isinstance(old, ir.Le):
            keep_new = (_bound(term) < _bound(old)) == neutral
            term = term if keep_new else old
        best[key] = term
    found = tuple(best.values())
    if _opposed(found, neutral=neutral):
        return ir.Bool(not neutral)
    facts = _facts(found, neutral=neutral)
    refined = [t if isinstance(t, ir.Le) else _given(t, facts) for t in found]
    if facts and tuple(refined) != found:
        return _merge(refined, kind, neutral=neutral)
    if not found:
        return ir.Bool(neutral)
    return found[0] if len(found) == 1 else kind(found)


def _bound(node: ir.Le) -> int:
    """The constant on the right of a comparison in normal form."""
    assert isinstance(node.right, ir.Const)
    return node.right.value


def _opposed(terms: tuple[ir.Pred, ...], *, neutral: bool) -> bool:
    """Whether two terms contradict each other (``&``), or cover everything (``|``)."""
    present = set(terms)
    bounds = {t.left: _bound(t) for t in terms if isinstance(t, ir.Le)}
    for term in terms:
        if isinstance(term, ir.Not) and term.term in present:
            return True
        if not isinstance(term, ir.Le):
            continue
        # term: x <= b; the other: -x <= c, that is x >= -c.
        other = bounds.get(_minus(term.left))
        if other is None:
            continue
        # x <= b & x >= c is False if b < c; x <= b | x >= c is True if b >= c - 1.
        b, c = _bound(term), -other
        if (b < c) if neutral else (b >= c - 1):
            return True
    return False


@lru_cache(maxsize=REMEMBERED)
def _minus(expr: ir.Expr) -> ir.Expr:
    return build(*_scale(sum_of(expr), -1))


def _facts(terms: tuple[ir.Pred, ...], *, neutral: bool) -> dict[ir.Expr, int]:
    """Upper bounds that the other terms may assume.

    In ``&`` the bounds hold; in ``|`` they fail: ``x > b``, that is ``-x <= -b - 1``.
    """
    bounds = [t for t in terms if isinstance(t, ir.Le)]
    if neutral:
        return {t.left: _bound(t) for t in bounds}
    return {_minus(t.left): -_bound(t) - 1 for t in bounds}


def _given(node: ir.Pred, facts: dict[ir.Expr, int]) -> ir.Pred:
    """``node`` simplified under the assumption that the facts (``x <= bound``) hold."""
    match node:
        case ir.Le(x, ir.Const(bound)):
            if facts.get(x, bound + 1) <= bound:
                return ir.Bool(True)
            least = -facts[other] if (other := _minus(x)) in facts else bound
            return ir.Bool(False) if least > bound else node
        case ir.And(terms):
            return _all([_given(t, facts) for t in terms])
        case ir.Or(terms):
            return _any([_given(t, facts) for t in terms])
    return node
