"""Which map each head has: a node with heads in it becomes one node a head."""

from typing import overload

from lowering import ir


def per_head(node: ir.Pred, num_heads: int) -> tuple[ir.Pred, ...]:
    """The node of every head, with ``h`` and ``ByHead`` resolved.

    ``h`` in the index of an operand stays: its value is known at run time only, and
    static plans do not depend on it.
    """
    return tuple(_of_head(node, head, num_heads) for head in range(num_heads))


def distinct(
    nodes: tuple[ir.Pred, ...],
) -> tuple[tuple[ir.Pred, ...], tuple[int, ...]]:
    """The different nodes in order of appearance, and which of them each head has."""
    maps = tuple(dict.fromkeys(nodes))
    index = {node: i for i, node in enumerate(maps)}
    return maps, tuple(index[node] for node in nodes)


@overload
def _of_head(node: ir.Expr, head: int, num_heads: int) -> ir.Expr: ...
@overload
def _of_head(node: ir.Pred, head: int, num_heads: int) -> ir.Pred: ...
def _of_head(node: ir.Node, head: int, num_heads: int) -> ir.Node:
    match node:
        case ir.Var("h"):
            return ir.Const(head)
        case ir.Operand():
            return node
        case ir.ByHead(terms):
            count = len(terms)
            if num_heads % count:
                raise ValueError(
                    f"per_head has {count} maps, which do not divide {num_heads} "
                    "heads: give a number of maps that does (each map serves an equal "
                    "group)"
                )
            return _of_head(terms[head * count // num_heads], head, num_heads)
    return ir.rebuild(node, lambda child: _of_head(child, head, num_heads))
