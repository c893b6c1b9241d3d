"""Defines ``Where``, the map of an expression that was traced on symbols."""

from dataclasses import dataclass

from typing_extensions import override

from lowering import ir
from lowering.expr.printing import show
from sadsl.maps.base import IndexMap
from sadsl.maps.symbols import Symbol, Truth, truth_node


@dataclass(frozen=True, repr=False)
class Where(IndexMap):
    """The pairs for which a traced expression is true; made by ``where``."""

    traced: ir.Pred

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(self.traced)

    @override
    def __repr__(self) -> str:
        axes = ir.axes(self.traced)
        names = "q, k, h" if "h" in axes else "q, k"
        names = "q, k, h, n" if "n" in axes else names
        return f"where(lambda {names}: {show(self.traced)})"


def traced_map(value: Truth | bool) -> Where:
    """The map of an expression that was traced already."""
    return Where(truth_node(value))
