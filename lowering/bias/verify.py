"""Checks the tables and arrays of a bias once lengths and heads are known."""

from collections.abc import Mapping

from lowering import ir
from lowering.bias import nodes
from lowering.expr.printing import show
from lowering.problem import Problem
from lowering.ranges.verify import index_range, verify_operands


def verify_scores(
    score: nodes.Score, problem: Problem, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that the arrays and tables of a bias are given and long enough.

    ``shapes`` has the shapes of the run-time arrays by name, without the batch axis.

    Raises:
      ValueError: an array is missing or too short, or an index leaves a table.
    """
    found = nodes.resolved(score, problem)
    for node in nodes.walk(found):
        if isinstance(node, nodes.Numbers):
            _verify_table(node, problem)
        if isinstance(node, nodes.Weights):
            _verify_weights(node, problem, shapes)
        if isinstance(node, nodes.ATOMS):
            for index in nodes.indices(node):
                _verify_tables_below(index, problem)
    integers = set(nodes.integer_operands(found))
    names = {operand.name for operand in integers}
    given = {name: shape for name, shape in shapes.items() if name in names}
    lengths = problem.q_seq_len, problem.kv_seq_len
    verify_operands(integers, *lengths, given, problem.num_heads)


def _verify_table(node: nodes.Numbers, problem: Problem) -> None:
    _verify_inside(node.index, len(node.values), problem)


def _verify_tables_below(index: ir.Expr, problem: Problem) -> None:
    for table in {n for n in ir.walk(index) if isinstance(n, ir.Table)}:
        _verify_inside(table.index, len(table.values), problem)


def _verify_inside(index: ir.Expr, size: int, problem: Problem) -> None:
    ends = _ends(index, problem)
    if ends is not None and (ends[0] < 0 or ends[1] >= size):
        raise ValueError(
            f"a bias looks up a table of {size} at `{show(index)}`, which runs from "
            f"{ends[0]} to {ends[1]} for {_sizes(problem)}: give one of {ends[1] + 1} "
            f"entries, or index it with `% {size}`"
        )


def _verify_weights(
    node: nodes.Weights, problem: Problem, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    text = nodes.show_score(node)
    if node.name not in shapes:
        raise ValueError(
            f"the bias reads `{text}`, and {node.name!r} was not given: pass "
            f"operands={{{node.name!r}: array}}"
        )
    shape = shapes[node.name]
    ends = [_ends(index, problem) for index in node.index]
    least = ["any" if end is None else str(end[1] + 1) for end in ends]
    fits = len(shape) == len(ends) and all(
        end is None
        or (index == ir.H and size == 1)
        or (index == ir.H and size == problem.num_heads)
        or (index != ir.H and end[0] >= 0 and end[1] < size)
        for index, end, size in zip(node.index, ends, shape, strict=True)
    )
    if fits:
        return
    for i, index in enumerate(node.index):
        if index == ir.H:
            least[i] += " or 1"
    low = [show(i) for i, e in zip(node.index, ends, strict=True) if e and e[0] < 0]
    below = f"; `{low[0]}` goes below 0, which no array allows" if low else ""
    raise ValueError(
        f"operand {node.name!r} has shape {shape} beside its batch axis, but the bias "
        f"reads `{text}` for {_sizes(problem)}: its axes must have {', '.join(least)} "
        f"entries, at least{below}"
    )


def _ends(index: ir.Expr, problem: Problem) -> tuple[int, int] | None:
    """Least and greatest value of an index; None if it reads a run-time array."""
    if any(isinstance(n, ir.Operand) for n in ir.walk(index)):
        return None
    lengths = problem.q_seq_len, problem.kv_seq_len
    heads = range(problem.num_heads) if "h" in ir.axes(index) else (0,)
    ends = [
        index_range(ir.substitute(index, {"h": ir.Const(h)}), *lengths) for h in heads
    ]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _sizes(problem: Problem) -> str:
    return (
        f"q_seq_len={problem.q_seq_len}, kv_seq_len={problem.kv_seq_len} and "
        f"{problem.num_heads} query heads"
    )
