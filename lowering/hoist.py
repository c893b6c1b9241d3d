"""Moves out of kernels what they cannot compute: look-ups and numbers beyond 32 bits.

An expression that reads a table or a run-time array and depends on the query alone, or
on the key alone, becomes a vector. The vector is computed once, outside of the kernel,
and fetched with its block. The same happens to an expression whose parts may exceed 32
bits; outside, it is computed in 64. A comparison that looks up an array (or a table of
more entries than kernels select from) at both the query and the key, or that does not
fit 32 bits, becomes one bit for every pair
(``run_time/pair_bits.py`` packs them).
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
    """Maps that kernels can compute, and the vectors and bits that they read."""

    maps: tuple[ir.Pred, ...]
    q: tuple[ir.Expr, ...] = ()
    kv: tuple[ir.Expr, ...] = ()
    bits: tuple[ir.Pred, ...] = ()


def hoist(maps: tuple[ir.Pred, ...], known: Known) -> Hoists:
    """Replaces the largest parts that kernels cannot compute; equal parts share a slot.

    ``known`` holds the spans of positions and of run-time arrays.
    """
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
