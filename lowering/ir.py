"""The nodes of every index map: integer expressions and predicates, a closed union.

An expression is an integer computed from a query position ``q``, a key position ``k``,
a head ``h`` and the number of keys ``n``; a predicate is true for the pairs that
attend. Nodes are frozen, hashable and equal by content. A pass is a function that
matches on them and ends in ``assert_never``. ``printing.show`` prints the Python
expression that builds a node again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeGuard, assert_never, overload

from lowering.hashing import Hashed, TableEntries, node

Axis = Literal["q", "k", "h", "n"]
Side = Literal["q", "k"]


@node
class Var(Hashed):
    """Position of the query or the key, index of the head, or the number of keys."""

    axis: Axis


@node
class Const(Hashed):
    """An integer constant."""

    value: int


@node
class Add(Hashed):
    """``left + right``."""

    left: "Expr"
    right: "Expr"


@node
class Mul(Hashed):
    """``expr * factor``."""

    expr: "Expr"
    factor: int


@node
class FloorDiv(Hashed):
    """``expr // divisor``, rounded down; the divisor is positive."""

    expr: "Expr"
    divisor: int


@node
class Mod(Hashed):
    """``expr % divisor`` in ``0 .. divisor - 1``; the divisor is positive."""

    expr: "Expr"
    divisor: int


@node
class Min(Hashed):
    """The smaller of ``left`` and ``right``."""

    left: "Expr"
    right: "Expr"


@node
class Max(Hashed):
    """The larger of ``left`` and ``right``."""

    left: "Expr"
    right: "Expr"


@node
class Log2(Hashed):
    """The floor of the binary logarithm of ``expr``, or 0 where that is below 1."""

    expr: "Expr"


@node
class Within(Hashed):
    """``expr``, which must take exactly the values 0 .. ``size - 1``.

    ``verify`` checks that it does; ``simplify`` then drops the node.
    """

    expr: "Expr"
    size: int


@node
class Table(Hashed):
    """``values[index]``: a constant table; the index lies within it."""

    values: tuple[int, ...]
    index: "Expr"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", TableEntries.of(self.values))


@node
class Operand(Hashed):
    """A run-time array at ``index``: one expression for each axis after the batch axis.

    An empty index reads one value for each batch row. An axis that is indexed by the
    query alone counts the queries of the call: ``q_offset`` does not shift it.
    """

    name: str
    index: "tuple[Expr, ...]"


@node
class Hoisted(Hashed):
    """A vector over the queries or the keys that is computed outside of the kernel."""

    axis: Side
    slot: int


@node
class HoistedBits(Hashed):
    """One bit for every pair, computed outside of the kernel."""

    slot: int


@node
class Bool(Hashed):
    """True: all pairs attend. False: no pair does."""

    value: bool


@node
class Le(Hashed):
    """``left <= right``."""

    left: "Expr"
    right: "Expr"


@node
class Eq(Hashed):
    """``left == right``."""

    left: "Expr"
    right: "Expr"


@node
class In(Hashed):
    """``expr`` is one of ``values``, which are sorted in ascending order."""

    expr: "Expr"
    values: tuple[int, ...]


@node
class PowerOfTwo(Hashed):
    """``expr`` is 1, 2, 4, 8, ..."""

    expr: "Expr"


@node
class And(Hashed):
    """All of the terms hold."""

    terms: tuple["Pred", ...]


@node
class Or(Hashed):
    """At least one of the terms holds."""

    terms: tuple["Pred", ...]


@node
class Not(Hashed):
    """The term does not hold."""

    term: "Pred"


@node
class ByHead(Hashed):
    """Head ``h`` of ``num_heads`` has term ``h * len(terms) // num_heads``."""

    terms: tuple["Pred", ...]


Expr: TypeAlias = (
    Var
    | Const
    | Add
    | Mul
    | FloorDiv
    | Mod
    | Min
    | Max
    | Log2
    | Within
    | Table
    | Operand
    | Hoisted
)
Pred: TypeAlias = (
    Bool | Le | Eq | In | PowerOfTwo | And | Or | Not | ByHead | HoistedBits
)
Node: TypeAlias = Expr | Pred

Q, K, H, N = Var("q"), Var("k"), Var("h"), Var("n")

# Returns an expression for an expression and a predicate for a predicate.
Change: TypeAlias = Callable[[Any], Any]
# The same, or None: the node itself stays, and its children are asked.
Rule: TypeAlias = Callable[[Any], Any]


@overload
def rebuild(node: Expr, change: Change) -> Expr: ...
@overload
def rebuild(node: Pred, change: Change) -> Pred: ...
def rebuild(node: Node, change: Change) -> Node:
    """``node`` with ``change`` applied to each child: one level of a rewriting."""
    match node:
        case Var() | Const() | Hoisted() | Bool() | HoistedBits():
            return node
        case Add(a, b) | Min(a, b) | Max(a, b) | Le(a, b) | Eq(a, b):
            return type(node)(change(a), change(b))
        case Mul(a, n) | FloorDiv(a, n) | Mod(a, n) | Within(a, n):
            return type(node)(change(a), n)
        case Log2(a) | PowerOfTwo(a) | Not(a):
            return type(node)(change(a))
        case In(a, values):
            return In(change(a), values)
        case Table(values, index):
            return Table(values, change(index))
        case Operand(name, index):
            return Operand(name, tuple(change(i) for i in index))
        case And(terms) | Or(terms) | ByHead(terms):
            return type(node)(tuple(change(t) for t in terms))
    assert_never(node)


@overload
def with_children(node: Expr, new: Iterable[Node | None]) -> Expr: ...
@overload
def with_children(node: Pred, new: Iterable[Node | None]) -> Pred: ...
def with_children(node: Node, new: Iterable[Node | None]) -> Node:
    """``node`` with new children, in the order of ``children``."""
    rest = iter(new)
    return rebuild(node, lambda _: next(rest))


@overload
def rewrite(node: Expr, rule: Rule) -> Expr: ...
@overload
def rewrite(node: Pred, rule: Rule) -> Pred: ...
def rewrite(node: Node, rule: Rule) -> Node:
    """``node`` with the largest parts that ``rule`` covers replaced.

    The rule is asked from the root down. Where it returns a node, that node replaces
    the part, and nothing inside of it is asked; where it returns None, the children of
    the part are asked.
    """

    def change(part: Any) -> Any:
        new = rule(part)
        return rebuild(part, change) if new is None else new

    return change(node)


@overload
def replace(node: Expr, new: Mapping[Any, Expr]) -> Expr: ...
@overload
def replace(node: Pred, new: Mapping[Any, Expr]) -> Pred: ...
def replace(node: Node, new: Mapping[Any, Expr]) -> Node:
    """``node`` with every part that is a key of ``new`` replaced, all at once."""
    kinds = {type(old) for old in new}
    return rewrite(node, lambda part: new.get(part) if type(part) in kinds else None)


@overload
def substitute(node: Expr, new: dict[Axis, Expr]) -> Expr: ...
@overload
def substitute(node: Pred, new: dict[Axis, Expr]) -> Pred: ...
def substitute(node: Node, new: dict[Axis, Expr]) -> Node:
    """``node`` with variables replaced, all at once."""
    return rewrite(node, lambda part: new.get(part.axis) if type(part) is Var else None)


def transpose(node: Pred) -> Pred:
    """``node`` with the roles of queries and keys exchanged."""
    return substitute(node, {"q": K, "k": Q})


def children(node: Node) -> tuple[Node, ...]:
    """The direct children of ``node``."""
    match node:
        case Var() | Const() | Hoisted() | Bool() | HoistedBits():
            return ()
        case Add(a, b) | Min(a, b) | Max(a, b) | Le(a, b) | Eq(a, b):
            return (a, b)
        case Mul(a, _) | FloorDiv(a, _) | Mod(a, _) | Within(a, _) | In(a, _):
            return (a,)
        case Log2(a) | PowerOfTwo(a) | Not(a):
            return (a,)
        case Table(_, index):
            return (index,)
        case Operand(_, index):
            return index
        case And(terms) | Or(terms) | ByHead(terms):
            return terms
    assert_never(node)


def walk(node: Node) -> Iterator[Node]:
    """``node`` and all its descendants, parents first."""
    yield node
    for child in children(node):
        yield from walk(child)


def axes(node: Node) -> frozenset[Axis]:
    """The variables that the node depends on; hoisted values count as their axis."""
    match node:
        case Var(axis) | Hoisted(axis, _):
            return frozenset({axis})
        case HoistedBits():
            return frozenset({"q", "k"})
    return frozenset().union(*(axes(child) for child in children(node)))


def is_name(x: Any) -> TypeGuard[str]:
    """Whether a user can give this name to a run-time array: a Python identifier.

    Passes name arrays of their own, and unknowns, by strings that are none.
    """
    return isinstance(x, str) and x.isidentifier()


def operand_names(node: Node) -> tuple[str, ...]:
    """The run-time arrays that the node reads, sorted."""
    return tuple(sorted({n.name for n in walk(node) if isinstance(n, Operand)}))
