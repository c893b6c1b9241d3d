"""Puts the positions of queries and keys in place of their indices."""

from dataclasses import dataclass
from typing import overload

from lowering import ir


@overload
def shift_queries(node: ir.Expr, offset: int | ir.Expr) -> ir.Expr: ...
@overload
def shift_queries(node: ir.Pred, offset: int | ir.Expr) -> ir.Pred: ...
def shift_queries(node: ir.Node, offset: int | ir.Expr) -> ir.Node:
    """``node`` with ``q + offset`` for ``q``: array indices instead of positions.

    An axis of a run-time array that is indexed by the query alone stays: the array
    holds the queries of the call, whatever their positions are.
    """
    by = ir.Const(offset) if isinstance(offset, int) else offset
    return at_positions(node, ir.Add(ir.Q, by), ir.K)


@dataclass(frozen=True, slots=True)
class WholeArrays:
    """The names of run-time arrays that hold all positions, not those of the call.

    ``q``: along the axes that queries index; ``k``: along those of keys.
    """

    q: frozenset[str] = frozenset()
    k: frozenset[str] = frozenset()

    def owns(self, name: str, index: ir.Expr) -> bool:
        """Whether an axis at ``index`` holds the queries or the keys of the call."""
        if index == ir.K:
            return name not in self.k
        return ir.axes(index) <= {"q", "h"} and name not in self.q


NO_ARRAYS = WholeArrays()


@overload
def at_positions(
    node: ir.Expr, q: ir.Expr, k: ir.Expr, whole: WholeArrays = NO_ARRAYS
) -> ir.Expr: ...
@overload
def at_positions(
    node: ir.Pred, q: ir.Expr, k: ir.Expr, whole: WholeArrays = NO_ARRAYS
) -> ir.Pred: ...
def at_positions(
    node: ir.Node, q: ir.Expr, k: ir.Expr, whole: WholeArrays = NO_ARRAYS
) -> ir.Node:
    """``node`` with the positions ``q`` and ``k`` of queries and keys in place of them.

    An axis of a run-time array that is indexed by the query alone, or by ``k`` itself,
    stays, unless the array is ``whole``: it holds the queries and the keys of the call.
    """

    def rule(part: ir.Node) -> ir.Node | None:
        match part:
            case ir.Var("q"):
                return q
            case ir.Var("k"):
                return k
            case ir.Operand(name, index):
                own = (whole.owns(name, i) for i in index)
                new = (
                    i if stays else ir.rewrite(i, rule)
                    for i, stays in zip(index, own, strict=True)
                )
                return ir.Operand(name, tuple(new))
        return None

    return ir.rewrite(node, rule)
