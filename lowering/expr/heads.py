"""Resolves heads: turns a map that depends on the head into one map for each head."""

from lowering import ir


def per_head(node: ir.Pred, num_heads: int) -> tuple[ir.Pred, ...]:
    """The node of every head, with ``h`` and ``ByHead`` resolved.

    ``h`` in the index of an operand stays: the operand is known at run time only, and
    static plans do not depend on it.
    """
    return tuple(_of_head(node, head, num_heads) for head in range(num_heads))


def distinct(
    nodes: tuple[ir.Pred, ...],
) -> tuple[tuple[ir.Pred, ...], tuple[int, ...]]:
    """The distinct nodes in order of appearance, and the index of each head's node."""
    maps = tuple(dict.fromkeys(nodes))
    index = {node: i for i, node in enumerate(maps)}
    return maps, tuple(index[node] for node in nodes)


def _of_head(node: ir.Pred, head: int, num_heads: int) -> ir.Pred:
    def rule(part: ir.Node) -> ir.Node | None:
        match part:
            case ir.Var("h"):
                return ir.Const(head)
            case ir.Operand():
                return part
            case ir.ByHead(terms):
                count = len(terms)
                if num_heads % count:
                    raise ValueError(
                        f"per_head has {count} maps, which do not divide {num_heads} "
                        "heads: give a number of maps that does (each map serves an "
                        "equal group of heads)"
                    )
                return ir.rewrite(terms[head * count // num_heads], rule)
        return None

    return ir.rewrite(node, rule)
