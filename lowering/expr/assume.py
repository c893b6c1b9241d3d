"""The widest map that a predicate can be, whatever some run-time arrays hold."""

from collections.abc import Callable
from typing import assert_never

from lowering import ir


def envelope(
    node: ir.Pred, unknown: Callable[[str], bool], *, held: bool = True
) -> ir.Pred:
    """``node`` with each comparison that reads an unknown array taken to hold.

    Every pair of ``node`` is in the result, for any values of the arrays whose names
    are ``unknown``. Under a negation such comparisons are taken not to hold; that is
    what ``held=False`` asks for: pairs that ``node`` has for any values.
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
