"""Specs for a part of the heads, whose numbers are known at run time only.

All devices run one program, so what depends on the head, such as ``per_head(a, b)`` or
the slopes of ``alibi()``, reads the number of each local head from an array.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from typing_extensions import override

from lowering import ir
from lowering.bias import nodes
from lowering.expr import heads as head_exprs
from sadsl.maps.base import IndexMap
from sadsl.maps.numbers import Real
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec, Term
from sadsl.terms.biases import Bias
from sadsl.terms.changed import Change, changed
from sadsl.terms.channel import Channel
from sadsl.terms.heads import Heads
from sadsl.terms.over import Over
from sadsl.terms.recurrent import Recurrent
from sadsl.terms.softmax import Softmax

# The number of each local head in the whole call, int32 ``[heads]``. The first is no
# identifier, so no caller's name; the second names the log-decays of local heads.
HEADS, DECAYS = "shard.heads", "shard_log_decays"
AT_HEAD = ir.Operand(HEADS, (ir.H,))


@dataclass(frozen=True, repr=False)
class LocalHeads(IndexMap):
    """Maps of some of the heads each: ``(map, heads)``, heads of the whole call."""

    shares: tuple[tuple[IndexMap, tuple[int, ...]], ...]
    num_heads: int

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        of_node: dict[ir.Pred, list[int]] = {}
        for part, mine in self.shares:
            # A part of ``heads`` counts its own heads.
            found = head_exprs.per_head(part.node, len(mine))
            for head, node in zip(mine, map(_at_head, found), strict=True):
                of_node.setdefault(node, []).append(head)
        terms = (
            ir.And((ir.In(AT_HEAD, tuple(sorted(heads))), node))
            for node, heads in of_node.items()
        )
        return Truth(ir.Or(tuple(terms)))

    @override
    def __repr__(self) -> str:
        return ", ".join(repr(part) for part, _ in self.shares)


@dataclass(frozen=True, repr=False)
class LocalBias(Bias):
    """A bias of all heads, at the local ones."""

    a: Bias
    num_heads: int

    @override
    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        return Real(_with_heads(self.a.score(self.num_heads)))

    @override
    def __repr__(self) -> str:
        return repr(self.a)


def _with_heads(score: nodes.Score) -> nodes.Score:
    match score:
        case nodes.Weights(name, index, running):
            own = (i if i == ir.H else _at_head(i) for i in index)
            return nodes.Weights(name, tuple(own), running)
        case nodes.Sum(a, b) | nodes.ScoreProduct(a, b):
            return type(score)(_with_heads(a), _with_heads(b))
    return nodes.with_indices(score, _at_head)


def _at_head(node: Any) -> Any:
    """A node with the numbers of local heads in the whole call for ``h``.

    An axis of an array that is indexed by ``h`` itself stays: it has the local heads.
    """

    def rule(part: ir.Node) -> ir.Node | None:
        if isinstance(part, ir.Var) and part.axis == "h":
            return AT_HEAD
        if isinstance(part, ir.Operand):
            own = (i if i == ir.H else ir.rewrite(i, rule) for i in part.index)
            return ir.Operand(part.name, tuple(own))
        return None

    return ir.rewrite(node, rule)


def of_local_heads(spec: Spec, num_heads: int) -> Spec:
    """The spec for the heads of one device; ``num_heads`` are those of the whole call.

    Raises:
      NotImplementedError: its heads may depend on one another, or have several rules.
    """
    change = Change(
        "heads=...",
        lambda pairs: _local_map(pairs, num_heads),
        lambda bias: _local_bias(bias, num_heads),
        lambda term: _local_term(term, num_heads),
    )
    return changed(spec, change)


def _local_map(spec: IndexMap, num_heads: int) -> IndexMap:
    _check_choices(spec)
    if not _depends(spec.node):
        return spec
    return LocalHeads(((spec, tuple(range(num_heads))),), num_heads)


def _check_choices(spec: IndexMap) -> None:
    """Refuses choices that may depend on several heads.

    Raises:
      NotImplementedError: there is one.
    """
    for choice in selections_of(spec):
        if choice.operands or getattr(choice, "scope", None) not in ("query", "head"):
            raise NotImplementedError(
                f"heads=... with {choice!r}: it may compare several heads, or read "
                "arrays of all heads: use heads=None, or a scope of 'query' or 'head'"
            )


def _local_bias(spec: Bias, num_heads: int) -> Bias:
    score = spec.score(num_heads)
    atoms = [x for x in nodes.walk(score) if isinstance(x, nodes.ATOMS)]
    by_head = any(
        "h" in ir.axes(i) and not (isinstance(x, nodes.Weights) and i == ir.H)
        for x in atoms
        for i in nodes.indices(x)
    )
    by_head = by_head or score != spec.score(2 * num_heads)
    return LocalBias(spec, num_heads) if by_head else spec


def _local_term(term: Term, num_heads: int) -> Spec | None:
    """Terms whose parts alone do not say what their local heads are."""
    match term:
        case Channel():
            return term
        case Over():
            return replace(term, map=_local_map(term.map, num_heads))
        case Heads():
            return _one_map(term, num_heads)
        case Recurrent(decay=tuple(decay)) if len(decay) > 1:
            # Decays by head become an operand of the local heads.
            return replace(term, decay=DECAYS)  # pyrefly: ignore
        case Recurrent():
            return term
    return None


def _one_map(spec: Heads, num_heads: int) -> IndexMap:
    """One map for all heads, if all parts are maps."""
    shares, first = [], 0
    for part, count in spec.shares:
        own = (
            part.map
            if isinstance(part, Softmax) and part == Softmax(part.map)
            else part
        )
        if not isinstance(own, IndexMap) or ir.H in _indices(own.node):
            raise NotImplementedError(
                f"heads=... with {spec!r}: {part!r} is no map, or reads arrays by "
                "head, so devices would run different programs: use heads=None"
            )
        _check_choices(own)
        shares.append((own, tuple(range(first, first + count))))
        first += count
    return LocalHeads(tuple(shares), num_heads)


def _indices(node: ir.Node) -> set[ir.Expr]:
    """The indices of the run-time arrays of a node."""
    return {i for x in ir.walk(node) if isinstance(x, ir.Operand) for i in x.index}


def decays_of(spec: Any) -> np.ndarray | None:
    """The log-decays by head that ``of_local_heads`` made an operand; None for none."""
    if isinstance(spec, Recurrent):
        by_head = isinstance(spec.decay, tuple) and len(spec.decay) > 1
        return np.log(np.asarray(spec.decay, np.float64)) if by_head else None
    found = [decays_of(part) for part in getattr(spec, "parts", ())]
    known = [x for x in found if x is not None]
    if len(known) > 1:
        raise NotImplementedError(
            f"heads=... with {spec!r}: several parts have decays by head: give them as "
            "operands, or use heads=None"
        )
    return known[0] if known else None


def may_deal_heads(spec: Any) -> bool:
    """Whether ``of_local_heads`` takes a spec, whatever the number of its heads."""
    try:
        of_local_heads(spec, 1)
    except NotImplementedError:
        return False
    return True


def depends_on_heads(spec: Any) -> bool:
    """Whether heads have different maps or biases."""
    found = of_local_heads(spec, 1) if may_deal_heads(spec) else None
    return found != spec


def _depends(node: ir.Pred) -> bool:
    """Whether heads have different maps, but for the arrays that they look up."""
    return any(isinstance(x, ir.ByHead) for x in ir.walk(node)) or "h" in _axes(node)


def _axes(node: ir.Node) -> frozenset[ir.Axis]:
    """The variables of a node, but for the heads that index an axis themselves."""
    if isinstance(node, ir.Var):
        return frozenset({node.axis})
    own = isinstance(node, ir.Operand)
    parts = (x for x in ir.children(node) if not (own and x == ir.H))
    return frozenset().union(*map(_axes, parts))


def local_heads(first: Array, count: int) -> Int32[Array, " heads"]:
    """The numbers of the local heads in the whole call."""
    return (first + jnp.arange(count)).astype(jnp.int32)
