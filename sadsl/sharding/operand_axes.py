"""Which axes of the run-time arrays of a spec belong to queries, keys and heads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, Literal, NamedTuple, TypeAlias

from lowering import ir
from lowering.bias import nodes
from sadsl.maps.base import IndexMap
from sadsl.selections.base import selections_of
from sadsl.terms.base import Term
from sadsl.terms.biases import Bias
from sadsl.terms.latent import Latent
from sadsl.terms.mixtures import Gated
from sadsl.terms.recurrent import Recurrent
from sadsl.terms.softmax import Softmax

# An axis has an entry for each query, for each key, for each head, or for none.
Role: TypeAlias = Literal["q", "k", "h", ""]
TOKENS: tuple[Role, Role] = ("q", "k")


class TokenAxis(NamedTuple):
    """An axis of an array, the batch axis counted, and whose entries it has."""

    axis: int
    role: Role


@dataclass(frozen=True)
class OperandAxes:
    """The role of each axis of an array, without the batch axis.

    ``whole``: each device needs the whole array, since some part of the spec looks it
    up at other places than its own query or key. ``at`` says where its own are used.
    ``batched``: it may have a batch axis in front.
    """

    roles: tuple[Role, ...]
    whole: bool = False
    at: frozenset[Role] = frozenset()
    batched: bool = True

    @property
    def tokens(self) -> TokenAxis | None:
        """The axis with an entry for each token that is dealt with the sequence.

        An array of pairs has the queries of a shard, and all keys.
        """
        if self.whole:
            return None
        for role in TOKENS:
            if role in self.roles:
                return TokenAxis(self.roles.index(role) + self.batched, role)
        return None

    @property
    def of_pairs(self) -> bool:
        """Whether it has an axis for queries and one for keys."""
        return {"q", "k"} <= set(self.roles)

    @property
    def head_axis(self) -> int | None:
        """The axis with an entry for each head, the batch axis counted, or None."""
        return self.roles.index("h") + self.batched if "h" in self.roles else None

    def joined(self, other: "OperandAxes") -> "OperandAxes":
        """What holds for both uses of an array."""
        axes = {None if x is None else x.axis for x in (self.tokens, other.tokens)}
        same = len(axes) == 1 and self.of_pairs == other.of_pairs
        same = same and not (self.whole or other.whole)
        roles = self.roles if len(self.roles) >= len(other.roles) else other.roles
        at, batched = self.at | other.at, self.batched and other.batched
        return OperandAxes(roles, not same, at, batched)


def operand_axes(spec: Any, given: Mapping[str, Any]) -> dict[str, OperandAxes]:
    """The axes of the arrays in ``given`` that ``spec`` reads, by name."""
    found: dict[str, OperandAxes] = {}
    for name, axes in _uses(spec, given):
        found[name] = found[name].joined(axes) if name in found else axes
    return found


@singledispatch
def _uses(spec: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    """Each use of an array by a spec."""
    if isinstance(spec, Term):
        for name, rank in spec.operands.items():
            yield name, OperandAxes(("",) * rank, whole=True)
        for part in spec.parts:
            # The keys of a map may be entries, which are not dealt.
            of_entries = isinstance(part, IndexMap) and not spec.of_tokens
            for name, axes in _uses(part, given):
                yield name, replace(axes, whole=axes.whole or of_entries)


@_uses.register
def _(spec: IndexMap, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    chosen = selections_of(spec)
    for part in ir.walk(spec.node):
        if isinstance(part, ir.Operand) and not any(s.owns(part.name) for s in chosen):
            yield part.name, _indexed(part.index)
    for choice in chosen:
        for name, rank in choice.operands.items():
            yield name, OperandAxes(("",) * rank, whole=True)
        for name in given:
            if choice.owns(name):
                yield name, OperandAxes(("",) * (given[name].ndim - 1), whole=True)


@_uses.register
def _(spec: Bias, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    del given
    score = spec.score(1)
    for part in nodes.weights(score):
        found = _indexed(part.index)
        # A running sum counts positions from the first one.
        running = part.running is not None
        yield part.name, replace(found, whole=found.whole or running)
    for part in nodes.integer_operands(score):
        yield part.name, _indexed(part.index)


@_uses.register
def _(spec: Softmax, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    yield from _uses(spec.map, given)
    for part in (spec.bias, spec.scale):
        if part is not None:
            yield from _uses(part, given)
    if spec.sink is not None:
        # Sinks of queries have the axes [batch, query, head].
        of_queries = spec.sink in given and given[spec.sink].ndim == 3
        roles: tuple[Role, ...] = ("q", "h") if of_queries else ("h",)
        at: set[Role] = {"q"} if of_queries else set()
        yield spec.sink, OperandAxes(roles, at=frozenset(at))


@_uses.register
def _(spec: Gated, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    yield spec.gates, OperandAxes(("q", "h", ""), at=frozenset({"q"}))
    for part in spec.parts:
        yield from _uses(part, given)


@_uses.register
def _(spec: Latent, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    yield spec.up, OperandAxes(("h", "", ""), batched=False)
    yield from _uses(spec.softmax, given)


@_uses.register
def _(spec: Recurrent, given: Mapping[str, Any]) -> Iterator[tuple[str, OperandAxes]]:
    del given
    for name, rank in spec.operands.items():
        if name in spec.of_call:
            roles: tuple[Role, ...] = ("h",) + ("",) * (rank - 1)
            yield name, OperandAxes(roles, batched=False)
        else:
            role: Role = "k" if name in spec.of_keys else "q"
            roles = (role, *(("h",) if rank > 1 else ()), *("",) * (rank - 2))
            yield name, OperandAxes(roles, at=frozenset({role}))


def _indexed(index: tuple[ir.Expr, ...]) -> OperandAxes:
    """The axes of an array that is looked up at ``index``."""
    roles: list[Role] = []
    whole = False
    for each in index:
        simple: dict[ir.Expr, Role] = {ir.Q: "q", ir.K: "k", ir.H: "h"}
        role = simple.get(each, "")
        roles.append(role)
        whole = whole or (not role and bool(ir.axes(each) & {"q", "k"}))
    tokens: list[Role] = [role for role in roles if role in TOKENS]
    whole = whole or tokens.count("q") > 1 or tokens.count("k") > 1
    return OperandAxes(tuple(roles), whole, frozenset(tokens))
