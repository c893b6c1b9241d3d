"""Prints a node as the Python expression that builds it again."""

from functools import lru_cache
from typing import assert_never

from lowering.ir import (
    Add,
    And,
    Bool,
    ByHead,
    Const,
    Eq,
    Expr,
    FloorDiv,
    Hoisted,
    HoistedBits,
    In,
    Le,
    Log2,
    Max,
    Min,
    Mod,
    Mul,
    Node,
    Not,
    Operand,
    Or,
    PowerOfTwo,
    Table,
    Var,
    Within,
    rewrite,
)


def show(node: Node) -> str:
    """The node as one line of Python in ``q``, ``k``, ``h`` and ``n``."""
    match node:
        case Var(axis):
            return axis
        case Hoisted(axis, slot):
            return f"{axis}_vector{slot}"
        case Const(value) | Bool(value):
            return str(value)
        case Add(a, Mul(b, -1)):
            return f"{show(a)} - {_factor(b)}"
        case Add(a, Const(value)) if value < 0:
            return f"{show(a)} - {-value}"
        case Add(a, b):
            return f"{show(a)} + {_factor(b)}"
        case Mul(a, n):
            return f"{_tight(a)} * {n}"
        case FloorDiv(a, n):
            return f"{_tight(a)} // {n}"
        case Mod(a, n):
            return f"{_tight(a)} % {n}"
        case Min(a, b):
            return f"minimum({show(a)}, {show(b)})"
        case Max(a, b):
            return f"maximum({show(a)}, {show(b)})"
        case Log2(a):
            return f"floor_log2({show(a)})"
        case Within(a, _):
            return show(a)
        case Table(values, index):
            return f"table({values})[{show(index)}]"
        case Operand(name, index):
            at = f"[{', '.join(map(show, index))}]" if index else ""
            return f"operand({name!r}){at}"
        case HoistedBits(slot):
            return f"bits{slot}[q, k]"
        case Le(a, b):
            return f"{show(a)} <= {show(b)}"
        case Eq(a, b):
            return f"{show(a)} == {show(b)}"
        case In(a, values):
            return f"isin({show(a)}, {show_set(values)})"
        case PowerOfTwo(a):
            return f"power_of_two({show(a)})"
        case And(terms):
            return " & ".join(_tight(t) for t in terms)
        case Or(terms):
            return " | ".join(_tight(t) for t in terms)
        # With a constant, `<` is read as `<=` of the next one.
        case Not(Le(a, b)) if not (isinstance(a, Const) or isinstance(b, Const)):
            return f"{show(b)} < {show(a)}"
        case Not(term):
            return f"~{_tight(term)}"
        case ByHead(terms):
            return f"per_head({', '.join(show(t) for t in terms)})"
    assert_never(node)


def show_set(values: tuple[int, ...]) -> str:
    """Numbers as a set; the empty set as ``()``, since ``{}`` is a dict."""
    return f"{{{', '.join(map(str, values))}}}" if values else "()"


def _factor(node: Node) -> str:
    """The node as the right side of a sum: a product needs no parentheses there."""
    if isinstance(node, Within):
        return _factor(node.expr)
    product = isinstance(node, Mul | FloorDiv | Mod)
    return show(node) if product else _tight(node)


def _tight(node: Node) -> str:
    """``show(node)``, in parentheses where a tighter operator could split it."""
    if isinstance(node, Within):
        return _tight(node.expr)
    text = show(node)
    atoms = (Var, Hoisted, Const, Bool, Min, Max, Log2, Table, Operand, In, ByHead)
    atoms += (PowerOfTwo,)
    negative = isinstance(node, Const) and node.value < 0
    return text if isinstance(node, atoms) and not negative else f"({text})"


@lru_cache(maxsize=1 << 14)
def sort_key(atom: Expr) -> tuple[bool, str]:
    """Sorts atoms of a sum: variables come first, and all of them by name."""
    if isinstance(atom, Var):
        return False, atom.axis
    return True, show(rewrite(atom, _short_table))


def _short_table(node: Node) -> Node | None:
    """A long table cut to its length and hash, which are quick to print."""
    match node:
        case Table(values, index) if len(values) > 16:
            short = len(values), hash(values)
            return Table(short, rewrite(index, _short_table))
    return None
