"""Factors a map into maps of single digits, such as the rows and columns of a grid."""

from itertools import pairwise

from lowering import ir
from lowering.solve.eliminate import by_digits, cuts_of


def factors(node: ir.Pred, n: int) -> list[tuple[ir.Pred, int]] | None:
    """A map of ``n`` positions as a product of maps of digits, or None.

    Each factor is a predicate of ``q`` and ``k``, and the number of its positions. A
    pair fulfils the node iff for each factor its digits fulfil that factor:
    node(q, k) == factor_0(q_0, k_0) & factor_1(q_1, k_1) & ...
    """
    cuts = cuts_of(node, ir.Q) | cuts_of(node, ir.K)
    by_q = by_digits(node, ir.Q, ir.Const(n - 1), cuts)
    by_k = by_digits(by_q.node, ir.K, ir.Const(n - 1), cuts) if by_q else None
    if by_q is None or by_k is None or n % by_q.weights[-1]:
        return None
    assert by_q.weights == by_k.weights
    terms = by_k.node.terms if isinstance(by_k.node, ir.And) else (by_k.node,)
    as_pair = dict.fromkeys(by_q.names, ir.Q) | dict.fromkeys(by_k.names, ir.K)
    parts: list[list[ir.Pred]] = [[] for _ in by_q.names]
    for term in terms:
        names = ir.operand_names(term)
        digits = {
            i
            for i, (q, k) in enumerate(zip(by_q.names, by_k.names, strict=True))
            if {q.name, k.name} & {*names}
        }
        if len(digits) > 1 or ir.axes(term):
            return None
        parts[min(digits, default=0)].append(ir.replace(term, as_pair))
    sizes = [*(b // a for a, b in pairwise(by_q.weights)), n // by_q.weights[-1]]
    nodes = [ir.And((ir.Bool(True), *found)) for found in parts]
    return list(zip(nodes, sizes, strict=True))
