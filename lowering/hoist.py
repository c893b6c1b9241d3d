"""Takes out of predicates what kernels cannot compute: look-ups, and too large numbers.

Whatever reads a table or a run-time array and depends on the query alone, or on the key
alone, becomes a vector that is computed once, outside of the kernel, and fetched with
its block. So does what 32 bits cannot hold on the way; there, 64 bits compute it. A
comparison that looks up a pair, or that 32 bits cannot do, becomes a bit of every pair
(``lowering/bits.py`` packs them).
"""

from dataclasses import dataclass

from lowering import ir
from lowering.expr.fits import (
    fits,
    is_one_sided,
    is_plain,
    looks_up_pairs,
)
from lowering.expr.static_range import Known


@dataclass(frozen=True)
class Hoists:
    """Maps that kernels can compute, and the vectors and bits they read."""

    maps: tuple[ir.Pred, ...]
    q: tuple[ir.Expr, ...] = ()
    kv: tuple[ir.Expr, ...] = ()
    bits: tuple[ir.Pred, ...] = ()


def hoist(maps: tuple[ir.Pred, ...], known: Known) -> Hoists:
    """Replaces the largest such expressions by ``Hoisted``; equal ones share a slot."""
    slots: dict[ir.Side, dict[ir.Expr, int]] = {"q": {}, "k": {}}
    bits: dict[ir.Pred, int] = {}

    def rule(node: ir.Node) -> ir.Node | None:
        if is_plain(node, known):
            return node
        if isinstance(node, ir.Expr):
            if not is_one_sided(node):
                return None
            axis: ir.Side = "k" if ir.axes(node) - {"h"} == {"k"} else "q"
            return ir.Hoisted(axis, slots[axis].setdefault(node, len(slots[axis])))
        comparison = isinstance(node, ir.Le | ir.Eq | ir.In | ir.PowerOfTwo)
        if comparison and (looks_up_pairs(node) or not fits(node, known)):
            return ir.HoistedBits(bits.setdefault(node, len(bits)))
        return None

    changed = tuple(ir.rewrite(node, rule) for node in maps)
    return Hoists(changed, tuple(slots["q"]), tuple(slots["k"]), tuple(bits))
