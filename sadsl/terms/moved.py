"""Maps and biases at positions that arrays of a call hold."""

from dataclasses import dataclass

from typing_extensions import override

from lowering import ir
from lowering.bias import nodes
from sadsl.maps.base import IndexMap
from sadsl.maps.numbers import Real
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import selections_of
from sadsl.terms.biases import Bias

# The position of the first query, among the run-time arrays of a call.
OFFSET = "q_offset"
POSITION = ir.Operand(OFFSET, ())
AFTER_OFFSET = ir.Add(ir.Q, POSITION)


@dataclass(frozen=True)
class PairPlaces:
    """Where the queries and the keys of a call are.

    Attributes:
      q, k: their positions, as expressions of their indices.
      held: a condition on indices beside the map, such as "this slot has a key".
      length: the number of keys that the map counts, for which it was verified; None:
        those of the call.
      queries: arrays of integers that have an entry for each key of a cache. At the
        query they are read under another name: ``of_queries(name)``.
    """

    q: ir.Expr = AFTER_OFFSET
    k: ir.Expr = ir.K
    held: ir.Pred | None = None
    length: int | None = None
    queries: frozenset[str] = frozenset()

    def expr(self, node: ir.Expr) -> ir.Expr:
        """An integer of positions, by indices."""
        named = ir.rewrite(ir.substitute(node, self._lengths), self._renamed)
        return ir.at_positions(named, self.q, self.k)

    def pred(self, node: ir.Pred) -> ir.Pred:
        """A condition on positions, by indices."""
        known = ir.substitute(node, self._lengths)
        if self.length is not None:
            known = _without_extents(known)
        named = ir.rewrite(known, self._renamed)
        found = ir.at_positions(named, self.q, self.k)
        return found if self.held is None else ir.And((found, self.held))

    @property
    def _lengths(self) -> dict[ir.Axis, ir.Expr]:
        return {} if self.length is None else {"n": ir.Const(self.length)}

    def _renamed(self, part: ir.Node) -> ir.Node | None:
        by_query = isinstance(part, ir.Operand) and ir.Q in part.index
        if by_query and part.name in self.queries:
            return ir.Operand(of_queries(part.name), part.index)
        return None


FROM_OFFSET = PairPlaces()


def _without_extents(node: ir.Pred) -> ir.Pred:
    """``node`` without the sizes that its positions must fill."""

    def rule(part: ir.Node) -> ir.Node | None:
        return ir.rewrite(part.expr, rule) if isinstance(part, ir.Within) else None

    return ir.rewrite(node, rule)


def of_queries(name: str) -> str:
    """The name of the entries of an array that belong to queries.

    It is no identifier, so no caller's name.
    """
    return f"{name}.queries"


@dataclass(frozen=True, repr=False)
class Moved(IndexMap):
    """A map at the places that arrays of the call hold."""

    a: IndexMap
    at: PairPlaces = FROM_OFFSET

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        found = self.at.pred(self.a.node)
        if selections_of(self.a):
            # A choice needs the position, even if the rest of the map does not.
            found = ir.And((found, ir.Le(ir.Const(0), POSITION)))
        return Truth(found)

    @override
    def __repr__(self) -> str:
        return repr(self.a)


@dataclass(frozen=True, repr=False)
class MovedBias(Bias):
    """A bias at the places that arrays of the call hold."""

    a: Bias
    at: PairPlaces = FROM_OFFSET

    @override
    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        return Real(nodes.with_indices(self.a.score(num_heads), self.at.expr))

    @override
    def __repr__(self) -> str:
        return repr(self.a)
