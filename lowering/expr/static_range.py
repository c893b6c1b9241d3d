"""Bounds an expression over all positions, from its form alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias, assert_never

from lowering import ir

# Least and greatest value, inclusive; None where no bound is known.
Span: TypeAlias = tuple[int | None, int | None]


@dataclass(frozen=True)
class Known:
    """The known spans of variables and of run-time arrays.

    ``arrays`` has spans by the name of an array; any other array has span ``array``.
    """

    axes: Mapping[ir.Axis, Span] = field(default_factory=dict)
    array: Span = (None, None)
    arrays: Mapping[str, Span] = field(default_factory=dict)


NOTHING = Known()


def span(node: ir.Expr, known: Known = NOTHING) -> Span:
    """Bounds that hold at every position; positions are not negative."""
    match node:
        case ir.Const(value):
            return value, value
        case ir.Var(axis):
            return known.axes.get(axis, (0, None))
        case ir.Log2(a):
            high = span(a, known)[1]
            return 0, None if high is None else max(high, 1).bit_length() - 1
        case ir.Add(a, b):
            return _add(span(a, known), span(b, known))
        case ir.Mul(a, n):
            return _mul(span(a, known), n)
        case ir.FloorDiv(a, n):
            low, high = span(a, known)
            return (
                None if low is None else low // n,
                None if high is None else high // n,
            )
        case ir.Mod(a, n):
            return _mod(span(a, known), n)
        case ir.Min(a, b):
            return _min(span(a, known), span(b, known))
        case ir.Max(a, b):
            low, high = _min(_mul(span(a, known), -1), _mul(span(b, known), -1))
            return _mul((low, high), -1)
        case ir.Within(_, size):
            return 0, size - 1
        case ir.Table(values, _):
            return _table(values)
        case ir.Operand(name, _):
            return known.arrays.get(name, known.array)
        case ir.Hoisted():
            return None, None
    assert_never(node)


@lru_cache(maxsize=64)
def _table(values: tuple[int, ...]) -> Span:
    return min(values), max(values)


def _add(a: Span, b: Span) -> Span:
    low = None if a[0] is None or b[0] is None else a[0] + b[0]
    high = None if a[1] is None or b[1] is None else a[1] + b[1]
    return low, high


def _mul(a: Span, n: int) -> Span:
    low, high = (None if x is None else x * n for x in a)
    return (low, high) if n >= 0 else (high, low)


def _mod(a: Span, n: int) -> Span:
    low, high = a
    if low is not None and high is not None and low // n == high // n:
        return low % n, high % n
    return 0, n - 1


def _min(a: Span, b: Span) -> Span:
    low = None if a[0] is None or b[0] is None else min(a[0], b[0])
    highs = [x for x in (a[1], b[1]) if x is not None]
    return low, min(highs, default=None)
