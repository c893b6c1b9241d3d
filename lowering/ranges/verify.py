"""Checks tables, grids and operands of a map once lengths and heads are known."""

from collections.abc import Collection, Mapping

import numpy as np

from lowering import ir
from lowering.expr import fits
from lowering.expr.printing import show
from lowering.expr.simplify import integer
from lowering.ranges.ranges import Ranges, Rectangles


def verify(maps: tuple[ir.Pred, ...], q_seq_len: int, kv_seq_len: int) -> None:
    """Checks that indices stay inside of tables and that positions fill grids.

    Raises:
      ValueError: some position reaches beyond a table, a permutation or a grid.
    """
    for node in maps:
        _verify_extents(node, q_seq_len, kv_seq_len)
        for table in {n for n in ir.walk(node) if isinstance(n, ir.Table)}:
            low, high = index_range(table.index, q_seq_len, kv_seq_len)
            if low < 0 or high >= len(table.values):
                raise ValueError(
                    f"a table (or permutation) of {len(table.values)} entries is "
                    f"indexed by `{show(table.index)}`, which runs from {low} to "
                    f"{high} for q_seq_len={q_seq_len} and kv_seq_len={kv_seq_len}: "
                    f"give one of {high + 1} entries, or index it with "
                    f"`% {len(table.values)}`"
                )


def _verify_extents(node: ir.Pred, q_seq_len: int, kv_seq_len: int) -> None:
    """Keys must fill a grid; queries may be a part of it, as in decoding."""
    for part in {n for n in ir.walk(node) if isinstance(n, ir.Within)}:
        _, high = index_range(part.expr, q_seq_len, kv_seq_len)
        is_filled = high == part.size - 1
        if not is_filled and not (ir.axes(part.expr) == {"q"} and high < part.size):
            raise ValueError(
                f"a grid (or its like) has {part.size} positions, but "
                f"`{show(part.expr)}` runs up to {high} for q_seq_len={q_seq_len} and "
                f"kv_seq_len={kv_seq_len}: the sizes of its axes must multiply to the "
                "number of keys (plus `extra`), and the queries must not exceed it"
            )


def verify_operands(
    needed: Collection[ir.Operand],
    q_seq_len: int,
    kv_seq_len: int,
    shapes: Mapping[str, tuple[int, ...]],
    num_heads: int,
) -> None:
    """Checks that the given operands are those that are needed, and long enough.

    ``shapes`` has the shapes of the arrays without their batch axis, by name.

    Raises:
      ValueError: an operand is missing, unused or too short, or an index is negative.
    """
    names = {n.name for n in needed}
    for name in sorted(names - set(shapes)):
        raise ValueError(
            f"the map reads the run-time array {name!r}, which was not given: "
            f"{_how(name)}"
        )
    for name in sorted(set(shapes) - names):
        raise ValueError(
            f"{name!r} was given, but no part of the map reads it: drop it, or use a "
            f"map that does ({_use(name)})"
        )
    for operand in sorted(needed, key=show):
        shape = shapes[operand.name]
        if not operand.index:
            if shape:
                raise ValueError(
                    f"operand {operand.name!r} is read bare, one value per batch row, "
                    f"but has {len(shape)} more axes of sizes {shape}: pass [batch] or "
                    "a scalar"
                )
            continue
        ends = [
            _operand_range(i, q_seq_len, kv_seq_len, num_heads) for i in operand.index
        ]
        large_enough = len(shape) == len(ends) and all(
            end is None or (end[0] >= 0 and end[1] < size)
            for end, size in zip(ends, shape, strict=True)
        )
        if not large_enough:
            least = ", ".join("..." if end is None else str(end[1] + 1) for end in ends)
            runs = " and ".join(
                f"`{show(i)}` from {end[0]} to {end[1]}"
                for i, end in zip(operand.index, ends, strict=True)
                if end is not None
            )
            raise ValueError(
                f"operand {operand.name!r} has shape {shape} beside its batch axis, "
                f"but is indexed by {runs}: pass [batch, {least}] or [{least}], at "
                "least, and no index below 0"
            )


def index_range(index: ir.Expr, q_seq_len: int, kv_seq_len: int) -> tuple[int, int]:
    """Least and greatest value of an expression over all positions, without heads."""
    known = fits.known_of(q_seq_len, kv_seq_len)
    if not fits.within(index, fits.INT62, known):
        index = integer(index)
        if not fits.within(index, fits.INT62, known):
            return fits.ends(index, known)
    ends = (0, q_seq_len - 1, 0, kv_seq_len - 1)
    whole = Rectangles(*(np.array([end]) for end in ends))
    found = Ranges(whole)(index)
    return int(found.low[0]), int(found.high[0])


def _operand_range(
    index: ir.Expr, q_seq_len: int, kv_seq_len: int, num_heads: int
) -> tuple[int, int] | None:
    """Least and greatest value of an index; None if the index reads an operand."""
    if any(isinstance(n, ir.Operand) for n in ir.walk(index)):
        return None
    if "h" not in ir.axes(index):
        return index_range(index, q_seq_len, kv_seq_len)
    ends = [
        index_range(ir.substitute(index, {"h": ir.Const(h)}), q_seq_len, kv_seq_len)
        for h in range(num_heads)
    ]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _how(name: str) -> str:
    if not ir.is_name(name):
        return "it is what content decides; pass what sadsl.select(spec, q, k) returns"
    if name.endswith("_segment_ids"):
        return "pass q_segment_ids= and kv_segment_ids=, int32 [batch, seq]"
    return f"pass operands={{{name!r}: array}}"


def _use(name: str) -> str:
    if name.endswith("_segment_ids"):
        return "segments()"
    return f"operand({name!r}) inside where"
