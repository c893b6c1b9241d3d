"""Terms made of terms: one normaliser over all (``joint``), or a mean of outputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count
from operator import or_
from typing import Literal, get_args

from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.terms import overlaps
from sadsl.terms.base import LayerSizes, Learned, Spec, Term, check_name, together
from sadsl.terms.overlaps import Member, Unit
from sadsl.terms.softmax import Softmax

Overlap = Literal["remove", "refuse", "count"]


@dataclass(frozen=True, repr=False)
class Mixture(Term):
    """Specs side by side. See the functions that make mixtures."""

    terms: tuple[Spec, ...]

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if not self.terms:
            raise ValueError(f"{name}(): give at least one spec")
        for term in self.terms:
            if not isinstance(term, IndexMap | Term):
                raise TypeError(f"{name} takes maps and terms, not {term!r}")

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The specs."""
        return self.terms

    def __repr__(self) -> str:
        return call_text(self, spread=True)


@dataclass(frozen=True, repr=False)
class Joint(Mixture):
    """One normaliser over all pairs: reducers R1 and R3. See ``joint``."""

    overlap: Overlap = "remove"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap not in get_args(Overlap):
            raise ValueError(
                f"joint: overlap={self.overlap!r} must be one of "
                f"{', '.join(get_args(Overlap))}"
            )
        for term in self.terms:
            if support_of(term) is None:
                raise ValueError(
                    f"joint: {term!r} has no single normaliser that others could "
                    "share: put it in average(...) or gated(...)"
                )

    @property
    def support(self) -> IndexMap:
        """The pairs of all parts."""
        return reduce(or_, (_known(support_of(term)) for term in self.terms))

    def resolved(
        self,
        q_seq_len: int,
        kv_seq_len: int | None = None,
        *,
        num_heads: int = 1,
        q_offset: int = 0,
    ) -> tuple[Spec, ...]:
        """The terms that run and are merged: no pair in two (unless they count twice).

        Raises:
          ValueError: a pair is in two terms, and cannot be taken out of one.
        """
        kv_seq_len = q_seq_len if kv_seq_len is None else kv_seq_len
        problem = Problem(q_seq_len, kv_seq_len, num_heads, q_offset)
        return tuple(
            Weighted(x.term, x.log_weight) if x.log_weight else x.term
            for x in members_of(self, problem)
        )


@dataclass(frozen=True, repr=False)
class Average(Mixture):
    """The mean of the outputs. See ``average``."""


@dataclass(frozen=True, repr=False)
class Gated(Mixture):
    """The sum of the outputs, each times a gate. See ``gated``."""

    gates: str = "gates"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("gated", "gates", self.gates)

    @property
    def operands(self) -> Mapping[str, int]:
        """The gates: query, head and part."""
        return {self.gates: 3}

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """A gate in (0, 1) for each query, head and part, and what the parts learn."""
        shape = sizes.num_q_heads, len(self.terms)
        gates = Learned(shape, per_query=True, squash="sigmoid")
        return together(self, super().learned(sizes), {self.gates: gates})


@dataclass(frozen=True, repr=False)
class Weighted(Term):
    """A term whose normaliser counts several times: R4. See ``weighted``."""

    term: Spec
    log_weight: float

    def __post_init__(self) -> None:
        if not isinstance(self.term, IndexMap | Term):
            raise TypeError(f"weighted takes a map or a term, not {self.term!r}")
        if not math.isfinite(self.log_weight):
            raise ValueError(
                f"weighted: log_weight={self.log_weight} must be finite; leave out a "
                "term that shall not count"
            )

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The term."""
        return (self.term,)

    @property
    def support(self) -> IndexMap | None:
        """The pairs of the term."""
        return support_of(self.term)

    def __repr__(self) -> str:
        return call_text(self)


def joint(*terms: Spec, overlap: Overlap = "remove") -> Joint:
    """One softmax over the pairs of all terms, each scored by its own rule.

    Maps and softmax terms of equal options run as one plan where that visits no more
    blocks; all else is merged by log-sum-exp, exactly.

    Args:
      terms: maps, ``softmax(...)``, ``summaries(...)``, ``linear(...)`` with a positive
        feature map, ``weighted(...)``, or other joints.
      overlap: "remove": a pair of several terms belongs to the first of them, so that
        none counts twice; a term that cannot give up pairs is refused. "refuse": the
        terms claim to have no pair in common, and ValueError says where they do.
        "count": every term keeps its pairs, as some published mixtures do.

    Within ``joint(...)``, other joints keep what they say of their own terms. A sink of
    one name is one sink, in however many terms: it joins the normaliser once, with the
    weight of the first term that has it. Dropout decides by query and key, as it does
    for one softmax over all; terms that keep the pairs of others
    (``overlap="count"``), and terms whose keys are no tokens, draw each its own.
    """
    return Joint(terms, overlap)


def average(*terms: Spec) -> Average:
    """The mean of the outputs of all terms (Ren et al., Combiner, 2021, section 4.4).

    A query that sees nothing in a term has output 0 there, which counts. Each term
    drops weights of its own: see ``dropout_key`` of ``attention``.
    """
    return Average(terms)


def gated(*terms: Spec, gates: str = "gates") -> Gated:
    """``sum_m gates[..., m] * out_m`` over the outputs of the terms.

    The operand ``gates`` is ``[batch or 1, q_seq, num_q_heads, terms]``, of floats that
    are used as they are; layers learn them, a sigmoid of a projection of each query's
    input (Yuan et al., Native sparse attention, 2025, section 3.2). Each term drops
    weights of its own: see ``dropout_key`` of ``attention``.
    """
    return Gated(terms, gates)


def weighted(term: Spec, log_weight: float) -> Weighted:
    """``term``, whose pairs count ``exp(log_weight)`` times in a joint.

    Its own output stays; its lse grows by ``log_weight``, as that of all its sinks and
    pairs. So a sample of ``m`` of ``n``
    keys stands for all of them with ``log(n / m)`` (Han et al., HyperAttention, 2024).
    """
    return Weighted(term, float(log_weight))


def support_of(spec: Spec) -> IndexMap | None:
    """The pairs of a spec that share one normaliser, if it has one."""
    return spec if isinstance(spec, IndexMap) else spec.support


def _known(support: IndexMap | None) -> IndexMap:
    assert support is not None
    return support


def one_softmax(term: Spec) -> Softmax | None:
    """The one softmax that a joint of maps with equal options means, if it is one."""
    match term:
        case IndexMap():
            return Softmax(term)
        case Softmax():
            return term
        case Joint(terms, overlap) if overlap != "count":
            parts = [one_softmax(part) for part in terms]
            known = [part for part in parts if part is not None]
            sinks = {part.sink for part in known} - {None}
            options = {replace(part, map=overlaps.NOWHERE, sink=None) for part in known}
            if len(known) < len(parts) or len(options) > 1 or len(sinks) > 1:
                return None
            whole = overlaps.union([part.map for part in known])
            return replace(known[0], map=whole, sink=next(iter(sinks), None))
    return None


def members_of(term: Joint, problem: Problem) -> tuple[Member, ...]:
    """The terms that run, whose outputs merged by log-sum-exp are those of a joint.

    Each sink is in one of them.

    Raises:
      ValueError: a pair is in two terms that cannot or shall not give it up.
    """
    units = _numbered(_units(term, problem))
    found = list(overlaps.settled(units, problem))
    for name, log_weight in _sinks(term).items():
        # Any softmax of this weight may carry it, and one of no pair where none does.
        nothing = Member(Softmax(overlaps.NOWHERE), log_weight)
        at = [i for i, x in enumerate(found) if _may_carry(x, log_weight)]
        carrier = found.pop(at[0]) if at else nothing
        assert isinstance(carrier.term, Softmax)
        carrier = carrier._replace(term=replace(carrier.term, sink=name))
        found.insert(at[0] if at else len(found), carrier)
    return tuple(found)


def _may_carry(member: Member, log_weight: float) -> bool:
    term = member.term
    free = isinstance(term, Softmax) and term.sink is None
    return free and member.log_weight == log_weight


def _sinks(term: Spec, log_weight: float = 0.0) -> dict[str, float]:
    """The sinks of a term of a joint, each with the weight of the first that has it."""
    match term:
        case Softmax(sink=str(name)):
            return {name: log_weight}
        case Weighted(inner, more):
            return _sinks(inner, log_weight + more)
        case Joint(terms):
            every = [each for p in terms for each in _sinks(p, log_weight).items()]
            return dict(reversed(every))
    return {}


def _units(term: Spec, problem: Problem) -> list[Unit]:
    """The members of a term of a joint, without sinks.

    Raises:
      ValueError: joints in it have a pair in two terms that may not share one.
    """
    match term:
        case IndexMap():
            return [(Member(Softmax(term)),)]
        case Softmax():
            return [(Member(replace(term, sink=None)),)]
        case Weighted(inner, more):
            return [
                tuple(x._replace(log_weight=x.log_weight + more) for x in unit)
                for unit in _units(inner, problem)
            ]
        case Joint(terms, overlap):
            parts = [_units(part, problem) for part in terms]
            if overlap == "count":
                return [_counted(parts, problem)]
            if overlap == "refuse":
                each = [overlaps.settled(part, problem) for part in parts]
                overlaps.check_disjoint(each, problem)
            return [unit for part in parts for unit in part]
    # The keys of other terms may be no tokens.
    return [(Member(term, draw=None),)]


def _counted(parts: list[list[Unit]], problem: Problem) -> Unit:
    """All members as one unit; each part has random numbers of its own."""
    found: list[Member] = []
    first = 0
    for part in parts:
        for member in overlaps.settled(part, problem):
            draw = None if member.draw is None else member.draw + first
            found.append(member._replace(draw=draw, counts=True))
        first += _num_draws(part)
    return tuple(found)


def _num_draws(units: list[Unit]) -> int:
    return 1 + max((x.draw for u in units for x in u if x.draw is not None), default=-1)


def _numbered(units: list[Unit]) -> list[Unit]:
    """With a number of random numbers for each member that has one of its own."""
    own = count(_num_draws(units) or 1)
    return [
        tuple(x._replace(draw=next(own)) if x.draw is None else x for x in unit)
        for unit in units
    ]
