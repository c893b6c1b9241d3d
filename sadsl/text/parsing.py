"""Parses the text of a spec, such as ``causal() & (window(512) | sinks(4))``.

The grammar is a part of that of Python expressions. Python's own parser makes a syntax
tree; the spec is built from it with a closed list of names and operators. The text is
never evaluated.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sadsl.maps import named, symbols
from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.grids import Grid
from sadsl.maps.numbers import log, weights
from sadsl.maps.symbols import POSITIONS, Symbol
from sadsl.maps.traced_map import traced_map
from sadsl.selections import budgets
from sadsl.selections.attended import attended
from sadsl.selections.cell_scores import scored
from sadsl.selections.cells import rules
from sadsl.selections.chunk_budget import chunk_budget
from sadsl.selections.descent import descent
from sadsl.selections.dot_scores import dot
from sadsl.selections.factorised_topk import factorised_topk
from sadsl.selections.kept_keys import kept_keys
from sadsl.selections.key_topw import key_positive, key_topw
from sadsl.selections.kmeans import kmeans
from sadsl.selections.lsh import lsh, sorted_chunks
from sadsl.selections.modalities import modalities
from sadsl.selections.reused import reused
from sadsl.selections.stripes import stripes
from sadsl.selections.tiles import tiles, within
from sadsl.selections.vertical_slash import vertical_slash, vertical_slash_mass
from sadsl.terms import mixtures
from sadsl.terms.base import Spec, Term
from sadsl.terms.biases import (
    alibi,
    distance_bias,
    key_bias,
    pair_bias,
    t5_bias,
    traced_bias,
)
from sadsl.terms.channel import channel
from sadsl.terms.cluster_regions import clusters
from sadsl.terms.compressed import compressed
from sadsl.terms.delta import delta
from sadsl.terms.features import cosformer_features
from sadsl.terms.grid_regions import columns, rowmajor, rows
from sadsl.terms.heads import heads
from sadsl.terms.latent import latent
from sadsl.terms.linear import linear
from sadsl.terms.local_linear import local_linear
from sadsl.terms.over import over
from sadsl.terms.own_regions import regions
from sadsl.terms.query_biases import gate_bias, query_distance_bias
from sadsl.terms.regions import spans, tower
from sadsl.terms.scatter_mean import scatter_mean
from sadsl.terms.softmax import softmax
from sadsl.terms.summaries import summaries

CALLS: Mapping[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        named.full, named.causal, named.window, named.sinks, named.prefix, named.keys,
        named.queries, named.strided, named.dilated, named.blocks, named.offsets,
        named.segments, named.where, per_head, softmax, symbols.minimum,
        symbols.maximum, symbols.floor_log2, symbols.power_of_two, symbols.isin,
        symbols.table, symbols.operand, abs, Grid, lsh,
        sorted_chunks, key_topw, key_positive,
        factorised_topk,
        budgets.topk, budgets.threshold, budgets.mass, rules, budgets.share,
        budgets.tokens, tiles, within, scored, dot, attended,
        kmeans, scatter_mean, heads, mixtures.joint, mixtures.average,
        linear, delta, cosformer_features, local_linear, over,
        latent, log,
        mixtures.gated, mixtures.weighted, channel, compressed,
        vertical_slash, vertical_slash_mass, kept_keys, reused,
        modalities, stripes, descent, chunk_budget,
        summaries, spans, tower, columns, rows, rowmajor, clusters, regions,
        weights, alibi, t5_bias, distance_bias, pair_bias, key_bias,
        query_distance_bias, gate_bias,
    )
}  # fmt: skip
METHODS = {"lift", "permute", "isin", "product", "axial", "neighborhood"}
ARGUMENTS = list(POSITIONS)
OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.MatMult: operator.matmul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def parse(text: str) -> Spec:
    """The spec that a text describes; ``parse(repr(spec)) == spec`` for every spec.

    Args:
      text: a map or a term, written with the functions of ``sadsl`` and
        ``sadsl.selections``; it may have several lines.

    Raises:
      ValueError: the text is not in the grammar; the message shows the position.

    Example:
      >>> import sadsl as sa
      >>> sa.parse("causal() & (window(512) | sinks(4))") == (
      ...     sa.causal() & (sa.window(512) | sa.sinks(4)))
      True
      >>> sa.parse("causal() and sinks(4)")
      Traceback (most recent call last):
      ValueError: at position 0, the spec uses `and` or `or`: write `&` or `|`, in
        parentheses
        causal() and sinks(4)
        ^
    """
    text = text.strip()
    if not text:
        _fail(text, 0, "is empty: write a map such as causal()")
    try:
        # The parentheses allow a spec of several lines.
        tree = ast.parse(f"({text}\n)", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = getattr(error, "lineno", None) or 1, getattr(error, "offset", None) or 2
        column = _column(text, place[0], place[1] - 1)
        _fail(text, column, f"is not an expression: {error.args[0]}")
    spec = _Reader(text).read(tree.body, {})
    if not isinstance(spec, IndexMap | Term):
        _fail(text, 0, f"spells {spec!r}, not an index map or a term")
    return spec


def _column(text: str, line: int, column: int) -> int:
    """The position in ``text`` of a line and column of ``(text)``, as Python counts."""
    before = sum(len(x) + 1 for x in text.split("\n")[: line - 1])
    return min(max(0, before + column - (line == 1)), len(text))


def _fail(
    text: str, column: int, what: str, cause: Exception | None = None
) -> NoReturn:
    # The message shows 80 characters around the position.
    left = max(0, column - 40)
    shown = text[left : left + 80].replace("\n", " ")
    raise ValueError(
        f"at position {column}, the spec {what}\n  {shown}\n  {' ' * (column - left)}^"
    ) from cause


class _Reader:
    """Builds the values of a syntax tree; ``names`` maps the arguments of a lambda."""

    def __init__(self, text: str) -> None:
        self.text = text

    def fail(
        self, node: ast.expr, what: str, cause: Exception | None = None
    ) -> NoReturn:
        # The parser counts columns in bytes; the message counts characters.
        line = f"({self.text}".split("\n")[node.lineno - 1].encode()
        column = len(line[: node.col_offset].decode())
        _fail(self.text, _column(self.text, node.lineno, column), what, cause)

    def read(self, node: ast.expr, names: Mapping[str, Symbol]) -> Any:
        try:
            return self._read(node, names)
        except (TypeError, AttributeError) as error:
            self.fail(node, f"is refused: {error}", error)
        except ValueError as error:
            if str(error).startswith("at position"):
                raise
            self.fail(node, f"is refused: {error}", error)

    def _read(self, node: ast.expr, names: Mapping[str, Symbol]) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() | None as value):
                return value
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
                return tuple(self.read(item, names) for item in items)
            case ast.Call(
                func=ast.Name(id="where"), args=[ast.Lambda() as f], keywords=[]
            ):
                return traced_map(self._traced(f, "where", ARGUMENTS))
            case ast.Call(
                func=ast.Name(id="bias"), args=[ast.Lambda() as f], keywords=[]
            ):
                return traced_bias(self._traced(f, "bias", ARGUMENTS[:3]))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                return self._call(CALLS[name], node, names)
            case ast.Call(func=ast.Attribute(value=inner, attr=name)) if (
                name in METHODS
            ):
                return self._call(getattr(self.read(inner, names), name), node, names)
            case ast.Attribute(value=inner, attr="T"):
                return self.read(inner, names).T
            case ast.Subscript(value=inner, slice=index):
                return self.read(inner, names)[self.read(index, names)]
            case ast.UnaryOp(op=ast.Invert(), operand=inner):
                return ~self.read(inner, names)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self.read(inner, names)
            case ast.BinOp(left=a, op=op, right=b) if type(op) in OPERATORS:
                return OPERATORS[type(op)](self.read(a, names), self.read(b, names))
            case ast.Compare(left=a, ops=[op], comparators=[b]) if (
                type(op) in COMPARISONS
            ):
                return COMPARISONS[type(op)](self.read(a, names), self.read(b, names))
        return self._refuse(node)

    def _call(self, function: Any, node: ast.Call, names: Mapping[str, Symbol]) -> Any:
        for word in node.keywords:
            if word.arg is None:
                self.fail(node, "uses `**`, which is not part of the grammar")
        args = [self.read(a, names) for a in node.args]
        return function(
            *args, **{w.arg: self.read(w.value, names) for w in node.keywords}
        )

    def _traced(self, function: ast.Lambda, what: str, names: list[str]) -> Any:
        """The body of a lambda on symbols; its parameters begin ``names``."""
        count = len(function.args.args)
        known = [", ".join(names[:n]) for n in range(2, len(names) + 1)]
        # Comparing the text also rejects defaults and stars.
        if ast.unparse(function.args) not in known:
            lambdas = " or ".join(f"`lambda {each}:`" for each in known)
            self.fail(function, f"needs {lambdas} in {what}, and nothing else")
        return self.read(function.body, {n: POSITIONS[n] for n in names[:count]})

    def _refuse(self, node: ast.expr) -> NoReturn:
        match node:
            case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
                known = ", ".join(sorted(CALLS))
                self.fail(node, f"has the unknown name {name!r}; known are {known}")
            case ast.BoolOp():
                self.fail(node, "uses `and` or `or`: write `&` or `|`, in parentheses")
            case ast.UnaryOp(op=ast.Not()):
                self.fail(node, "uses `not`: write `~`")
            case ast.Compare():
                self.fail(
                    node, "chains comparisons or uses `in`: write `&`, or isin(...)"
                )
        self.fail(
            node, f"holds {ast.unparse(node)[:40]!r}, which is not in the grammar"
        )
