"""Maps and biases at positions that arrays of a call hold."""

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lowering import ir
from lowering.bias import nodes
from lowering.expr.places import NO_ARRAYS, WholeArrays, at_positions
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
      queries: arrays that have an entry for each key of a cache or of a shard. At the
        query they are read under another name: ``of_queries(name)``.
      whole: arrays that hold all positions, not those of the call.
    """

    q: ir.Expr = AFTER_OFFSET
    k: ir.Expr = ir.K
    held: ir.Pred | None = None
    length: int | None = None
    queries: frozenset[str] = frozenset()
    whole: WholeArrays = NO_ARRAYS

    def expr(self, node: ir.Expr) -> ir.Expr:
        """An integer of positions, by indices."""
        node = _inside_tables(node)
        named = ir.rewrite(ir.substitute(node, self._lengths), self._renamed)
        return at_positions(named, self.q, self.k, self.whole)

    def score(self, score: nodes.Score) -> nodes.Score:
        """A bias of positions, by indices."""
        names = {name: of_queries(name) for name in self.queries}
        return nodes.with_indices(score, self.expr, self.whole, names)

    def pred(self, node: ir.Pred) -> ir.Pred:
        """A condition on positions, by indices."""
        known = ir.substitute(_inside_tables(node), self._lengths)
        if self.length is not None:
            known = _without_extents(known)
        named = ir.rewrite(known, self._renamed)
        found = at_positions(named, self.q, self.k, self.whole)
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


def _inside_tables(node: Any) -> Any:
    """``node`` with indices of tables that stay inside, wherever queries and keys are.

    Positions inside of the call are inside of the tables, which was checked. Others,
    such as those of padding, attend nowhere.
    """

    def rule(part: ir.Node) -> ir.Node | None:
        if not isinstance(part, ir.Table) or ir.operand_names(part.index):
            return None
        last = ir.Const(len(part.values) - 1)
        index = ir.rewrite(part.index, rule)
        return ir.Table(part.values, ir.Max(ir.Const(0), ir.Min(index, last)))

    return ir.rewrite(node, rule)


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
        return Real(self.at.score(self.a.score(num_heads)))

    @override
    def __repr__(self) -> str:
        return repr(self.a)
