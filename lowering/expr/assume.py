"""Bounds a predicate from above or below when some run-time arrays are unknown."""

from collections.abc import Callable
from typing import assert_never

from lowering import ir


def envelope(
    node: ir.Pred, unknown: Callable[[str], bool], *, held: bool = True
) -> ir.Pred:
    """``node`` with each comparison that reads an unknown array replaced by a constant.

    ``unknown`` is asked by the name of an array. With ``held=True`` such comparisons
    become true, and false under a negation: the result holds wherever ``node`` does,
    for any values of the arrays. With ``held=False`` it holds only where ``node`` does.
    """
    match node:
        case ir.And(terms) | ir.Or(terms) | ir.ByHead(terms):
            new = tuple(envelope(term, unknown, held=held) for term in terms)
            return type(node)(new)
        case ir.Not(term):
            return ir.Not(envelope(term, unknown, held=not held))
        case ir.Bool() | ir.HoistedBits():
            return node
        case ir.Le() | ir.Eq() | ir.In() | ir.PowerOfTwo():
            return ir.Bool(held) if any(map(unknown, ir.operand_names(node))) else node
    assert_never(node)
