"""Solves a predicate for one unknown: a union of branches of bounds and a residue.

The rules are exact; an error names the part that none of them covers. They are rules of
Presburger arithmetic (Cooper, Theorem proving in arithmetic without multiplication,
1972) for the forms that maps use: linear comparisons, floor division, minima and
maxima, one residue class, finite sets. Each rule below has its formula above it.
"""

from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from math import gcd, lcm
from typing import TypeAlias, assert_never

from lowering import ir
from lowering.expr.evaluate import intervals
from lowering.expr.printing import show
from lowering.expr.simplify import Sum, integer, simplify

# A position, or a fresh unknown: an operand whose name is no identifier.
Unknown: TypeAlias = ir.Var | ir.Operand
Bound: TypeAlias = tuple[ir.Expr, int]

MOST_BRANCHES = 256
# Expressions of positions have fewer bits than this.
MOST_BITS = 48
# Pairs of branches that a conjunction may try; most of them contradict each other.
MOST_PAIRS = 2048
# A residue or a table entry is split case by case if it has at most this many cases.
MOST_CASES = 64


@dataclass(frozen=True)
class Branch:
    """A conjunction of constraints on ``x``.

    A lower bound ``(e, m)`` says ``e <= m x``, an upper one ``m x <= e``, with
    ``m > 0``; ``residue`` is ``(r, s)`` for ``x = r (mod s)``. The conditions and all
    expressions are free of ``x``.
    """

    lowers: tuple[Bound, ...] = ()
    uppers: tuple[Bound, ...] = ()
    residue: Bound | None = None
    conditions: tuple[ir.Pred, ...] = ()


def depends(node: ir.Node, x: Unknown) -> bool:
    """Whether ``x`` occurs in the node."""
    return any(part == x for part in ir.walk(node))


def solve(node: ir.Pred, x: Unknown) -> tuple[Branch, ...]:
    """The branches of a predicate in normal form, without heads.

    Raises:
      NotImplementedError: no rule covers some part, or there are too many branches.
    """
    if not depends(node, x):
        return _conditional(node)
    match node:
        case ir.Or(terms):
            return _limited([b for t in terms for b in solve(t, x)], node)
        case ir.And(terms):
            found: tuple[Branch, ...] = (Branch(),)
            for term in terms:
                parts = solve(term, x)
                if len(found) * len(parts) > MOST_PAIRS:
                    raise _too_many(node, len(found) * len(parts))
                both = [_conjoin(a, b) for a in found for b in parts]
                found = _limited([b for b in both if b is not None], node)
            return found
        case ir.Le(left, ir.Const(bound)):
            return _le(left, bound, x)
        case ir.Eq(left, ir.Const(bound)):
            return _eq(left, bound, x)
        case ir.In(expr, values):
            return solve(_member(expr, values), x)
        case ir.Not(ir.Eq(left, ir.Const(bound))):
            return solve(_other(left, (bound,)), x)
        case ir.Not(ir.In(expr, values)):
            return solve(_other(expr, values), x)
        case ir.Not() | ir.PowerOfTwo() | ir.Le() | ir.Eq() | ir.HoistedBits():
            raise _resists(node, x)
        case ir.Bool() | ir.ByHead():
            raise AssertionError("constants do not depend, and heads are resolved")
    assert_never(node)


def linear(expr: ir.Expr) -> tuple[dict[ir.Expr, int], int]:
    """The coefficients of the atoms and the constant of a sum in normal form."""
    match expr:
        case ir.Const(value):
            return {}, value
        case ir.Mul(atom, factor):
            return {atom: factor}, 0
        case ir.Add(a, b):
            (left, c), (right, d) = linear(a), linear(b)
            return {**left, **right}, c + d
    return {expr: 1}, 0


def from_linear(terms: Sum, constant: int) -> ir.Expr:
    """The inverse of ``linear``: the terms in their order, the constant last."""
    parts = [x if f == 1 else ir.Mul(x, f) for x, f in terms.items()]
    if constant or not parts:
        parts.append(ir.Const(constant))
    return reduce(ir.Add, parts)


def minus(a: ir.Expr, b: ir.Expr) -> ir.Expr:
    """``a - b``."""
    return integer(ir.Add(a, ir.Mul(b, -1)))


def ceil_div(bound: Bound) -> ir.Expr:
    """``ceil(e / m)`` for a bound ``(e, m)``: the least ``x`` with ``e <= m x``."""
    expr, m = bound
    return expr if m == 1 else ir.Mul(ir.FloorDiv(ir.Mul(expr, -1), m), -1)


def _conditional(node: ir.Pred) -> tuple[Branch, ...]:
    if node == ir.Bool(False):
        return ()
    return (Branch(),) if node == ir.Bool(True) else (Branch(conditions=(node,)),)


def _limited(branches: list[Branch], node: ir.Pred) -> tuple[Branch, ...]:
    found = tuple(dict.fromkeys(branches))
    if len(found) > MOST_BRANCHES:
        raise _too_many(node, len(found))
    return found


def _too_many(node: ir.Node, count: int) -> NotImplementedError:
    return NotImplementedError(
        f"solving `{_short(node)}` makes {count} cases, more than {MOST_BRANCHES}"
    )


def _resists(node: ir.Node, x: Unknown) -> NotImplementedError:
    return NotImplementedError(f"cannot solve `{_short(node)}` for {name_of(x)}")


def _short(node: ir.Node) -> str:
    text = show(node)
    for part in {n for n in ir.walk(node) if isinstance(n, ir.Operand)}:
        if not ir.is_name(part.name):
            text = text.replace(show(part), name_of(part))
    return text if len(text) <= 200 else f"{text[:200]}..."


def name_of(x: Unknown) -> str:
    """The name of the unknown for error messages."""
    return x.axis if isinstance(x, ir.Var) else x.name.strip()


# --- comparisons ---


def _apart(left: ir.Expr, bound: int, x: Unknown) -> tuple[dict[ir.Expr, int], ir.Expr]:
    """Moves terms without ``x`` to the right: coefficients of atoms, and right side."""
    terms, constant = linear(left)
    mine = {atom: f for atom, f in terms.items() if depends(atom, x)}
    others = {a: f for a, f in terms.items() if a not in mine}
    rest = from_linear(others, constant - bound)
    return mine, integer(ir.Mul(rest, -1))


# f x <= r                 an upper bound for f > 0, a lower bound for f < 0
# f max(a, b) + s <= r     iff  f a + s <= r & f b + s <= r  for f > 0, | for f < 0
# f min(a, b) + s <= r     iff  f a + s <= r | f b + s <= r  for f > 0, & for f < 0
# f (e // d) <= r          iff  e <= (r // f) d + d - 1      for f > 0
# -f (e // d) <= r         iff  -(r // f) d <= e             for f > 0
# f floor_log2(e) <= c     see log2_le
def _le(left: ir.Expr, bound: int, x: Unknown) -> tuple[Branch, ...]:
    mine, right = _apart(left, bound, x)
    for atom, f in mine.items():
        if isinstance(atom, ir.Min | ir.Max):
            both = (f > 0) == isinstance(atom, ir.Max)
            parts = tuple(
                ir.Le(_with(mine, atom, part), right)
                for part in (atom.left, atom.right)
            )
            return solve(simplify((ir.And if both else ir.Or)(parts)), x)
    if len(mine) == 1:
        ((atom, f),) = mine.items()
        # f atom <= right: atom <= floor(right / f), or atom >= ceil(-right / -f).
        edge = right if abs(f) == 1 else ir.FloorDiv(right, abs(f))
        match atom:
            case ir.Var() | ir.Operand() if atom == x:
                if f > 0:
                    return (Branch(uppers=((right, f),)),)
                return (Branch(lowers=((integer(ir.Mul(right, -1)), -f),)),)
            case ir.FloorDiv(inner, d) if f > 0:
                top = ir.Add(ir.Mul(edge, d), ir.Const(d - 1))
                return solve(simplify(ir.Le(inner, top)), x)
            case ir.FloorDiv(inner, d):
                return solve(simplify(ir.Le(ir.Mul(edge, -d), inner)), x)
            case ir.Log2(inner) if isinstance(right, ir.Const):
                return solve(log2_le(inner, f, right.value), x)
    node = ir.Le(left, ir.Const(bound))
    cases = _cases(mine, right, x) or _by_order(node, x)
    if cases is None:
        raise _resists(node, x)
    return solve(cases, x)


def _with(mine: dict[ir.Expr, int], atom: ir.Expr, new: ir.Expr) -> ir.Expr:
    """The sum ``mine`` with ``new`` for ``atom``."""
    others = {a: f for a, f in mine.items() if a != atom}
    return ir.Add(from_linear(others, 0), ir.Mul(new, mine[atom]))


# floor_log2(e) <= m  iff  e <= 2**(m + 1) - 1
# m <= floor_log2(e)  iff  2**m <= e,  for m > 0
def log2_le(inner: ir.Expr, f: int, right: int) -> ir.Pred:
    """``f * floor_log2(inner) <= right``."""
    if f > 0:
        most = right // f
        if not 0 <= most < MOST_BITS:
            return ir.Bool(most > 0)
        return simplify(ir.Le(inner, ir.Const(2 ** (most + 1) - 1)))
    least = -(right // -f)
    if not 0 < least < MOST_BITS:
        return ir.Bool(least <= 0)
    return simplify(ir.Le(ir.Const(2**least), inner))


# f (e % s) + t <= r  iff  (e % s == 0 & t <= r) | (e % s == 1 & f + t <= r) | ...
# f table[i] + t <= r  iff  (i == 0 & f table[0] + t <= r) | ...
def _cases(mine: dict[ir.Expr, int], right: ir.Expr, x: Unknown) -> ir.Pred | None:
    """``sum <= right`` by the cases of a residue or a table index, if few, or None."""
    for atom in mine:
        match atom:
            case ir.Mod(inner, s) if s <= MOST_CASES and _residue_of(inner, x):
                keys = [(ir.Eq(atom, ir.Const(r)), r) for r in range(s)]
            case ir.Table(values, index) if len(values) <= MOST_CASES:
                keys = [(ir.Eq(index, ir.Const(i)), v) for i, v in enumerate(values)]
            case _:
                continue
        parts = [
            ir.And((key, ir.Le(_with(mine, atom, ir.Const(v)), right)))
            for key, v in keys
        ]
        return simplify(ir.Or(tuple(parts)))
    return None


# A(min(a, b))  iff  (a <= b & A(a)) | (b + 1 <= a & A(b));  max likewise
def _by_order(node: ir.Pred, x: Unknown) -> ir.Pred | None:
    """The node by the two cases of an inner minimum or maximum, or None."""
    for part in ir.walk(node):
        if isinstance(part, ir.Min | ir.Max) and depends(part, x):
            a, b = part.left, part.right
            low, high = (a, b) if isinstance(part, ir.Min) else (b, a)
            ordered = ir.And((ir.Le(a, b), ir.replace(node, {part: low})))
            after = ir.Le(ir.Add(b, ir.Const(1)), a)
            reverse = ir.And((after, ir.replace(node, {part: high})))
            return simplify(ir.Or((ordered, reverse)))
    return None


def _residue_of(inner: ir.Expr, x: Unknown) -> int | None:
    """The factor of ``x`` in a sum whose other terms do not depend on it, or None."""
    terms, _ = linear(inner)
    mine = [(a, f) for a, f in terms.items() if depends(a, x)]
    return mine[0][1] if [a for a, _ in mine] == [x] else None


# a == c  iff  a <= c & c <= a, but for a remainder: see _congruence
def _eq(left: ir.Expr, bound: int, x: Unknown) -> tuple[Branch, ...]:
    mine, right = _apart(left, bound, x)
    if len(mine) == 1:
        ((atom, f),) = mine.items()
        if isinstance(atom, ir.Mod):
            m = _residue_of(atom.expr, x)
            if m is not None:
                return _congruence(atom, m, f, right, x)
            node = ir.Eq(left, ir.Const(bound))
            cases = _by_order(node, x)
            if cases is None:
                raise _resists(node, x)
            return solve(cases, x)
    low, high = ir.Le(left, ir.Const(bound)), ir.Le(ir.Const(bound), left)
    return solve(simplify(ir.And((low, high))), x)


# f ((m x + e) % s) == r  iff, for v = r / f and g = gcd(m, s):
#   r % |f| == 0 & 0 <= v < s & (v - e) % g == 0
#   & x = (v - e) / g * (m / g)**-1  (mod s / g)
def _congruence(
    atom: ir.Mod, m: int, f: int, right: ir.Expr, x: Unknown
) -> tuple[Branch, ...]:
    """``f * ((m x + e) % s) == right``."""
    s = atom.divisor
    value = ir.FloorDiv(ir.Mul(right, 1 if f > 0 else -1), abs(f))
    target = ir.Add(minus(value, atom.expr), ir.Mul(x, m))
    common = gcd(m, s)
    modulus = s // common
    conditions = simplify(
        ir.And(
            (
                ir.Eq(ir.Mod(right, abs(f)), ir.Const(0)),
                ir.Le(ir.Const(0), value),
                ir.Le(value, ir.Const(s - 1)),
                ir.Eq(ir.Mod(target, common), ir.Const(0)),
            )
        )
    )
    inverse = pow(m // common, -1, modulus) if modulus > 1 else 0
    first = integer(ir.Mul(ir.FloorDiv(target, common), inverse))
    if isinstance(first, ir.Const):
        first = ir.Const(first.value % modulus)
    residue = None if modulus == 1 else (first, modulus)
    return tuple(replace(b, residue=residue) for b in _conditional(conditions))


# e in S  iff  a <= e & e <= b  for one of the maximal intervals a .. b of S
def _member(expr: ir.Expr, values: tuple[int, ...]) -> ir.Pred:
    parts = [
        ir.Eq(expr, ir.Const(a))
        if a == b
        else ir.And((ir.Le(ir.Const(a), expr), ir.Le(expr, ir.Const(b))))
        for a, b in intervals(values)
    ]
    return simplify(ir.Or(tuple(parts)))


def _other(expr: ir.Expr, values: tuple[int, ...]) -> ir.Pred:
    """``expr`` is none of ``values``: below, between or above them."""
    found = intervals(values)
    parts: list[ir.Pred] = [ir.Le(expr, ir.Const(found[0][0] - 1))]
    for (_, a), (b, _) in pairwise(found):
        low, high = ir.Le(ir.Const(a + 1), expr), ir.Le(expr, ir.Const(b - 1))
        parts.append(ir.And((low, high)))
    parts.append(ir.Le(ir.Const(found[-1][1] + 1), expr))
    return simplify(ir.Or(tuple(parts)))


# --- conjunction of branches ---


def _conjoin(a: Branch, b: Branch) -> Branch | None:
    """The conjunction of two branches, or None if they contradict each other."""
    residue, agree = _meet(a.residue, b.residue)
    found = dict.fromkeys((*a.conditions, *b.conditions, agree))
    conditions = tuple(c for c in found if c != ir.Bool(True))
    if ir.Bool(False) in conditions:
        return None
    return Branch(
        lowers=tuple(dict.fromkeys(a.lowers + b.lowers)),
        uppers=tuple(dict.fromkeys(a.uppers + b.uppers)),
        residue=residue,
        conditions=conditions,
    )


# x = r (mod s) & x = t (mod u)  iff, for g = gcd(s, u):  (t - r) % g == 0
#   & x = r + s (((t - r) / g (s / g)**-1) % (u / g))  (mod lcm(s, u))
def _meet(a: Bound | None, b: Bound | None) -> tuple[Bound | None, ir.Pred]:
    """Both residues as one, and the condition under which some ``x`` has both."""
    if a is None or b is None:
        return a or b, ir.Bool(True)
    (r, s), (t, u) = a, b
    common = gcd(s, u)
    agree = simplify(ir.Eq(ir.Mod(minus(t, r), common), ir.Const(0)))
    if s % u == 0:
        return a, agree
    if u % s == 0:
        return b, agree
    # The Chinese remainder theorem.
    inverse = pow(s // common, -1, u // common)
    steps = ir.Mul(ir.FloorDiv(minus(t, r), common), inverse)
    first = ir.Add(r, ir.Mul(ir.Mod(steps, u // common), s))
    return (integer(first), lcm(s, u)), agree
