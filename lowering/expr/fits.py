"""Checks that 32 bits, or 64, hold every part of a predicate for the given lengths.

Kernels compute with int32, and run-time arrays hold any int32. Plans use 64 bits, and
so does what is evaluated outside of kernels where 32 are not enough.
"""

from lowering import ir
from lowering.expr.printing import show
from lowering.expr.simplify import simplify
from lowering.expr.static_range import Known, Span, span

# A table whose index mixes q and k is a chain of selects in a kernel, which has no
# gather. With more entries, its comparison is a bit for every pair.
MAX_SELECTS = 64
INT32 = -(2**31), 2**31 - 1
# Sums in kernels stay below half of it: the bounds of a plan subtract two of them.
MOST_SUM = 2**30 - 1
# The range of plans and exact evaluation: int64, with room for a sum of two.
INT62 = -(2**62), 2**62 - 1


def known_of(
    q_seq_len: int,
    kv_seq_len: int,
    num_heads: int = 1,
    arrays: dict[str, Span] | None = None,
) -> Known:
    """The spans of positions and heads; ``arrays`` has those narrower than int32."""
    sizes: dict[ir.Axis, int] = {"q": q_seq_len, "k": kv_seq_len, "h": num_heads}
    axes = {axis: (0, max(size, 1) - 1) for axis, size in sizes.items()}
    return Known(axes, INT32, arrays or {})


def ends(node: ir.Expr, known: Known) -> tuple[int, int]:
    """Least and greatest value of an expression whose variables all have spans."""
    low, high = span(node, known)
    assert low is not None, node
    assert high is not None, node
    return low, high


def within(node: ir.Node, bits: tuple[int, int], known: Known) -> bool:
    """Whether every part of the node, and its constants, stays within ``bits``."""
    return _beyond(node, bits, known) is None


def _beyond(node: ir.Node, bits: tuple[int, int], known: Known) -> ir.Node | None:
    """An innermost part that is not within ``bits``, or None."""
    for child in ir.children(node):
        found = _beyond(child, bits, known)
        if found is not None:
            return found
    numbers: tuple[int, ...] = ()
    match node:
        case ir.Mul(_, n) | ir.FloorDiv(_, n) | ir.Mod(_, n):
            numbers = (n,)
        case ir.In(_, values):
            numbers = values[:1] + values[-1:]
    if isinstance(node, ir.Expr):
        numbers = (*numbers, *ends(node, known))
    return None if all(bits[0] <= n <= bits[1] for n in numbers) else node


def exact(node: ir.Pred, known: Known) -> ir.Pred:
    """``node``, or an equal one in normal form, whose parts 64 bits hold.

    Raises:
      ValueError: some part grows beyond 64 bits.
    """
    if within(node, INT62, known):
        return node
    return bounded(simplify(node), known)


def bounded(node: ir.Pred, known: Known) -> ir.Pred:
    """A predicate in normal form whose constants are clipped to what is reachable.

    For ``a`` in ``low .. high`` and a constant ``c`` that is no int32:
    a <= c  is  a <= min(max(c, low - 1), high);  a == c  is  False if c is outside;
    a in set  keeps the members inside. So a window longer than the sequence becomes as
    long as the sequence.

    Raises:
      ValueError: some part grows beyond 64 bits.
    """
    if is_plain(node, known):
        return node
    found = _bounded(node, known)
    if found != node:
        found = simplify(found)
    check_64_bits(found, known)
    return found


def check_64_bits(node: ir.Node, known: Known) -> None:
    """Raises an error that names a part which 64 bits may not hold.

    Raises:
      ValueError: some part of the node may grow beyond 64 bits.
    """
    part = _beyond(node, INT62, known)
    if part is None:
        return
    what = "has a constant"
    if isinstance(part, ir.Expr):
        low, high = ends(part, known)
        what = f"runs from {low} to {high} for these lengths and any int32 operands,"
    raise ValueError(
        f"`{show(part)[:200]}` {what} which 64 bits cannot hold: use smaller "
        "constants, or clip an operand with minimum and maximum before it is multiplied"
    )


def _bounded(node: ir.Pred, known: Known) -> ir.Pred:
    def rule(part: ir.Pred) -> ir.Pred | None:
        match part:
            case ir.Le(a, ir.Const(value)) if not is_32(value):
                low, high = ends(a, known)
                return ir.Le(a, ir.Const(min(max(value, low - 1), high)))
            case ir.Eq(a, ir.Const(value)) if not is_32(value):
                low, high = ends(a, known)
                return part if low <= value <= high else ir.Bool(False)
            case ir.In(a, values) if not all(map(is_32, values)):
                low, high = ends(a, known)
                return ir.In(a, tuple(v for v in values if low <= v <= high))
            case ir.And() | ir.Or() | ir.Not() | ir.ByHead():
                return None
        return part

    return ir.rewrite(node, rule)


def is_32(value: int) -> bool:
    """Whether ``value`` is an int32."""
    return INT32[0] <= value <= INT32[1]


def is_one_sided(node: ir.Expr) -> bool:
    """Whether the node can be a hoisted vector: it reads queries, or keys, alone."""
    return not isinstance(node, ir.Const) and len(ir.axes(node) - {"h"}) <= 1


def is_plain(node: ir.Node, known: Known) -> bool:
    """Whether the node is arithmetic of positions that 32 bits hold with a margin."""
    match node:
        case ir.Table() | ir.Operand():
            return False
        case ir.Var():
            return True
        case ir.In(_, values) if not all(map(is_32, values)):
            return False
    if isinstance(node, ir.Expr) and not _has_room(node, known):
        return False
    return all(is_plain(child, known) for child in ir.children(node))


def _has_room(node: ir.Expr, known: Known) -> bool:
    most = MOST_SUM if isinstance(node, ir.Add | ir.Mul) else INT32[1]
    low, high = ends(node, known)
    match node:
        case ir.Mul(_, n) | ir.FloorDiv(_, n) | ir.Mod(_, n) if not is_32(n):
            return False
    return -most - 1 <= low and high <= most


def fits(node: ir.Node, known: Known) -> bool:
    """Whether a kernel can compute the node, if one-sided parts are int32 vectors."""
    if is_plain(node, known):
        return True
    if not isinstance(node, ir.Expr):
        constants = node.values if isinstance(node, ir.In) else ()
        return all(map(is_32, constants)) and all(
            fits(child, known) for child in ir.children(node)
        )
    if is_one_sided(node):
        low, high = ends(node, known)
        return is_32(low) and is_32(high)
    return _has_room(node, known) and all(fits(c, known) for c in ir.children(node))


def looks_up_pairs(node: ir.Pred) -> bool:
    """Whether the node reads an array at both the query and the key.

    The array is a run-time array, or a table of too many entries for kernels.
    """
    return any(
        {"q", "k"} <= ir.axes(n)
        for n in ir.walk(node)
        if isinstance(n, ir.Operand)
        or (isinstance(n, ir.Table) and len(n.values) > MAX_SELECTS)
    )
