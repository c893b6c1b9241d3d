"""Moves what depends on the query and on the key to the two sides of a comparison.

A kernel then computes each side once for a row or a column of a tile, and one
comparison for each pair.
"""

from lowering import ir
from lowering.expr.simplify import Sum, build, sum_of


def sides_apart(node: ir.Pred) -> ir.Pred:
    """An equal predicate, whose comparisons have keys left and queries right.

    ``k - q <= 0`` becomes ``k <= q``. A comparison stays as it is if a part of it
    depends on both.
    """
    return ir.rewrite(node, _rule)


def _rule(node: ir.Node) -> ir.Node | None:
    if not isinstance(node, ir.Le | ir.Eq):
        return None
    total, constant = sum_of(ir.Add(node.left, ir.Mul(node.right, -1)))
    keys: Sum = {x: f for x, f in total.items() if "k" in ir.axes(x)}
    rest: Sum = {x: -f for x, f in total.items() if x not in keys}
    of_rest = frozenset().union(*(ir.axes(x) for x in rest))
    of_keys = frozenset().union(*(ir.axes(x) for x in keys))
    if "q" in of_keys or "q" not in of_rest or not keys:
        return None
    if any(f > 0 for f in keys.values()):
        return type(node)(build(keys, 0), build(rest, -constant))
    rest, keys = ({x: -f for x, f in side.items()} for side in (rest, keys))
    return type(node)(build(rest, constant), build(keys, 0))
