"""Query heads of a group as rows of their key head, by rewriting the map.

Query ``c`` of head ``h * group + g`` is row ``g * queries + c`` of key head ``h``. So
``q`` becomes ``q % queries``, and the query head is ``h * group + q // queries``. A
kernel then reads each key block once for all query heads of its group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lowering import ir
from lowering.bias import nodes
from lowering.bias.nodes import resolved
from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.maps.numbers import Real
from sadsl.maps.symbols import Symbol, Truth
from sadsl.run.options import Options
from sadsl.terms.biases import Bias
from sadsl.terms.softmax import Softmax


@dataclass(frozen=True, repr=False)
class MapOfRows(IndexMap):
    """A map whose queries are rows and whose heads are key heads."""

    rows: ir.Pred

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(self.rows)


@dataclass(frozen=True, repr=False)
class BiasOfRows(Bias):
    """A bias whose queries are rows and whose heads are key heads."""

    rows: nodes.Score

    @override
    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return Real(self.rows)


@dataclass(frozen=True)
class QueryRows:
    """The numbers of queries, of query heads for each key head, and of key heads."""

    queries: int
    group: int
    kv_heads: int

    @property
    def query(self) -> ir.Expr:
        """The query of row ``q``."""
        return ir.Mod(ir.Q, self.queries) if self.queries > 1 else ir.Const(0)

    @property
    def member(self) -> ir.Expr:
        """The place of the query head of row ``q`` in its group."""
        if self.group == 1:
            return ir.Const(0)
        return ir.FloorDiv(ir.Q, self.queries) if self.queries > 1 else ir.Q

    @property
    def new(self) -> dict[ir.Axis, ir.Expr]:
        """What replaces the query and the query head."""
        return {"q": self.query, "h": ir.Add(ir.Mul(ir.H, self.group), self.member)}

    def to_rows(
        self, q: Float[Array, "batch q heads dim"]
    ) -> Float[Array, "batch kv_heads rows dim"]:
        """The queries as rows."""
        batch, _, _, dim = q.shape
        q = q.reshape(batch, self.queries, self.kv_heads, self.group, dim)
        return jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, self.kv_heads, -1, dim)

    def to_queries(
        self, o: Float[Array, "batch kv_heads rows dim"]
    ) -> Float[Array, "batch q heads dim"]:
        """Undoes ``to_rows``."""
        batch, _, _, dim = o.shape
        o = o.reshape(batch, self.kv_heads, self.group, self.queries, dim)
        o = jnp.transpose(o, (0, 3, 1, 2, 4))
        return o.reshape(batch, self.queries, -1, dim)


def options_of_rows(options: Options, rows: QueryRows) -> Options:
    """The options of the same call on rows; the order of positions is kept."""
    program = options.stages["simplify"]
    every = [program.maps[m] for m in program.map_of_head]
    node = ir.rewrite(map_of_rows(every, rows), _with_row_axis)
    term = Softmax(MapOfRows(node), options.term.logits_soft_cap)
    if options.score is not None:
        score = resolved(options.score, options.problem)
        term = replace(term, bias=BiasOfRows(score_of_rows(score, rows)))
    length = rows.queries * rows.group
    problem = Problem(length, options.problem.kv_seq_len, rows.kv_heads)
    setting = options.setting
    config = replace(setting.config, relayout=False)
    return Options(term, problem, replace(setting, q_offset=0, config=config))


def map_of_rows(every: list[ir.Pred], rows: QueryRows) -> ir.Pred:
    """The map of rows from the resolved maps of the query heads."""
    size = rows.group
    groups = [tuple(every[i : i + size]) for i in range(0, len(every), size)]
    of_group = {group: _of_group(group, rows) for group in groups}
    terms = tuple(of_group[group] for group in groups)
    return terms[0] if len(of_group) == 1 else ir.ByHead(terms)


def _of_group(maps: tuple[ir.Pred, ...], rows: QueryRows) -> ir.Pred:
    members: dict[ir.Pred, list[int]] = {}
    for i, node in enumerate(maps):
        members.setdefault(node, []).append(i)
    moved = {node: ir.substitute(node, rows.new) for node in members}
    if len(moved) == 1:
        return moved[maps[0]]
    return ir.Or(
        tuple(
            ir.And((ir.In(rows.member, tuple(mine)), moved[node]))
            for node, mine in members.items()
        )
    )


# The end of the name of an array that has an axis of rows; no caller's name has it.
BY_ROW = ".row"


def _with_row_axis(node: ir.Node) -> ir.Node | None:
    """An operand of neither queries nor keys, such as a position, as one of each row.

    A comparison of a key with it is then computed by the kernel. Without that axis, it
    would be made outside, for every key of the cache.
    """
    if isinstance(node, ir.Operand) and not ir.axes(node) & {"q", "k"}:
        return ir.Operand(node.name + BY_ROW, (*node.index, ir.Q))
    return None


def arrays_of_rows(arrays: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The run-time arrays ``[batch or 1, ...]`` that the maps of rows read."""
    found, length = dict(arrays), options.problem.q_seq_len
    for name in ir.operand_names(options.term.map.node):
        if name.endswith(BY_ROW):
            x = arrays[name.removesuffix(BY_ROW)][..., None]
            found[name] = jnp.broadcast_to(x, (*x.shape[:-1], length))
    return found


def score_of_rows(score: nodes.Score, rows: QueryRows) -> nodes.Score:
    """The bias of rows from a resolved bias."""

    def change(expr: ir.Expr) -> ir.Expr:
        return ir.substitute(expr, rows.new)

    def changed(node: nodes.Score) -> nodes.Score:
        match node:
            case nodes.Integer(expr) | nodes.Log(expr):
                return type(node)(change(expr))
            case nodes.Number():
                return node
            case nodes.Numbers(values, index):
                return nodes.Numbers(values, change(index))
            case nodes.Weights(name, index):
                return nodes.Weights(name, tuple(map(change, index)))
            case nodes.Sum(a, b) | nodes.ScoreProduct(a, b):
                return type(node)(changed(a), changed(b))
        assert_never(node)

    return changed(score)
