"""Terms made of terms: ``joint``, ``average``, ``gated`` and ``weighted``."""

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
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms import overlaps
from sadsl.terms.base import LayerSizes, Learned, Spec, Term, together
from sadsl.terms.overlaps import Member, Unit
from sadsl.terms.softmax import Softmax

Overlap = Literal["remove", "refuse", "count"]


@dataclass(frozen=True, repr=False)
class Mixture(Term):
    """The base class of terms that combine several specs."""

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
        """The combined specs."""
        return self.terms

    def __repr__(self) -> str:
        return call_text(self, spread=True)


@dataclass(frozen=True, repr=False)
class Joint(Mixture):
    """One softmax over the pairs of all parts; see ``joint``."""

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
                    f"joint: {term!r} has no single normaliser of positive weights "
                    "that others could share: put it in average(...) or gated(...)"
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
        """The terms that run and are merged; no two share a pair, unless both count.

        Raises:
          ValueError: a pair is in two terms, and cannot be taken out of the later one.
        """
        kv_seq_len = q_seq_len if kv_seq_len is None else kv_seq_len
        problem = Problem(q_seq_len, kv_seq_len, num_heads, q_offset)
        return tuple(
            Weighted(x.term, x.log_weight) if x.log_weight else x.term
            for x in members_of(self, problem)
        )


@dataclass(frozen=True, repr=False)
class Average(Mixture):
    """The mean of the outputs; see ``average``."""


@dataclass(frozen=True, repr=False)
class Gated(Mixture):
    """The sum of the outputs, each multiplied by a gate; see ``gated``."""

    gates: str = "gates"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_operand_name("gated: gates", self.gates)

    @property
    def operands(self) -> Mapping[str, int]:
        """The gates, with axes for query, head and part."""
        return {self.gates: 3}

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """A gate in (0, 1) for each query, head and part, and what the parts learn."""
        shape = sizes.num_q_heads, len(self.terms)
        gates = Learned(shape, per_query=True, squash="sigmoid")
        return together(self, super().learned(sizes), {self.gates: gates})


@dataclass(frozen=True, repr=False)
class Weighted(Term):
    """A term whose pairs count several times in a joint; see ``weighted``."""

    term: Spec
    log_weight: float

    def __post_init__(self) -> None:
        if not isinstance(self.term, IndexMap | Term):
            raise TypeError(f"weighted takes a map or a term, not {self.term!r}")
        if not math.isfinite(self.log_weight):
            raise ValueError(
                f"weighted: log_weight={self.log_weight} must be finite; leave the "
                "term out if it must not count"
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

    Maps and softmax terms with equal options run as one plan if that visits no more
    blocks. All other terms are merged by log-sum-exp, which is exact.

    A joint inside another one keeps its own ``overlap``. A sink of one name joins the
    normaliser once, however many terms have it, with the weight of the first of them.
    Dropout draws by query and key, as for one softmax over all pairs. Terms that keep
    shared pairs (``overlap="count"``), and terms whose keys are not tokens, each draw
    anew.

    Args:
      *terms: maps, ``softmax(...)``, ``summaries(...)``, ``linear(...)`` with a
        nonnegative feature map, ``compressed(...)``, ``over(...)``, ``weighted(...)``,
        or joints.
      overlap: what happens to a pair of several terms. "remove": it belongs to the
        first of them; a later term that cannot give up pairs is refused. "refuse": it
        is an error. "count": it counts in each of them, as in some published mixtures.

    Raises:
      TypeError: a part is neither a map nor a term.
      ValueError: a part has no single normaliser, or ``overlap`` is unknown.

    Example:
      The second term gives up the pairs of the first:

      >>> import sadsl as sa
      >>> near = sa.softmax(sa.causal() & sa.window(2), bias=sa.alibi())
      >>> for term in sa.joint(near, sa.causal()).resolved(256):
      ...     print(term)
      softmax(causal() & window(2), bias=alibi())
      softmax(causal() - (causal() & window(2)))
    """
    return Joint(terms, overlap)


def average(*terms: Spec) -> Average:
    """The mean of the outputs of all terms.

    Each term has its own softmax (Ren et al., Combiner: full attention transformer with
    sparse computation cost, 2021, section 4.4). A query that sees no key of a term has
    output 0 there, which counts in the mean. Dropout draws anew for each term: see
    ``dropout_key`` of ``attention``.

    Args:
      *terms: maps and terms.

    Raises:
      TypeError: a part is neither a map nor a term.
      ValueError: there is no part.

    Example:
      >>> import sadsl as sa
      >>> sa.average(sa.causal() & sa.window(64), sa.causal() & sa.strided(64))
      average(causal() & window(64), causal() & strided(64))
    """
    return Average(terms)


def gated(*terms: Spec, gates: str = "gates") -> Gated:
    """The sum ``sum_m gates[..., m] * out_m`` of the outputs of the terms.

    Layers learn the gates as a sigmoid of a projection of each query's input (Yuan et
    al., Native sparse attention: hardware-aligned and natively trainable sparse
    attention, 2025, section 3.2). Dropout draws anew for each term: see ``dropout_key``
    of ``attention``.

    Args:
      *terms: maps and terms.
      gates: the operand ``[batch or 1, q_seq, num_q_heads, terms]`` of floats, which
        are used without a squash.

    Raises:
      TypeError: a part is neither a map nor a term.
      ValueError: there is no part, or ``gates`` is not an identifier.

    Example:
      >>> import sadsl as sa
      >>> term = sa.gated(sa.causal() & sa.window(512), sa.compressed(32, 16))
      >>> term.operands
      {'gates': 3}
    """
    return Gated(terms, gates)


def weighted(term: Spec, log_weight: float) -> Weighted:
    """Lets the pairs of ``term`` count ``exp(log_weight)`` times in a joint.

    The output of the term itself does not change. Its lse grows by ``log_weight``; the
    weight is that of its sinks, too. For example, a sample of ``m`` of ``n`` keys
    stands for all of them with ``log(n / m)`` (Han et al., HyperAttention: long-context
    attention in near-linear time, 2024).

    Args:
      term: a map or a term.
      log_weight: the natural logarithm of the weight, finite.

    Raises:
      TypeError: ``term`` is neither a map nor a term.
      ValueError: ``log_weight`` is not finite.

    Example:
      >>> import sadsl as sa
      >>> sample = sa.weighted(sa.strided(4) - sa.window(8, 8), 1.386)  # log 4
      >>> sa.joint(sa.window(8, 8), sample)
      joint(window(8, 8), weighted(strided(4) - window(8, 8), 1.386))
    """
    return Weighted(term, float(log_weight))


def support_of(spec: Spec) -> IndexMap | None:
    """The pairs of a spec that share one normaliser; None if there are several."""
    return spec if isinstance(spec, IndexMap) else spec.support


def _known(support: IndexMap | None) -> IndexMap:
    assert support is not None
    return support


def one_softmax(term: Spec) -> Softmax | None:
    """The one softmax that a spec is equal to, or None.

    A joint is equal to one softmax if its parts are maps and softmax terms with equal
    options and at most one sink.
    """
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
    """The members that run; their outputs, merged by log-sum-exp, are the joint's.

    Each sink belongs to exactly one member.

    Raises:
      ValueError: a pair is in two terms, and cannot or must not be given up.
    """
    units = _numbered(_units(term, problem))
    found = list(overlaps.settled(units, problem))
    for name, log_weight in _sinks(term).items():
        # A softmax member of this weight carries the sink, or a new one without pairs.
        nothing = Member(Softmax(overlaps.NOWHERE), log_weight)
        at = [i for i, x in enumerate(found) if _may_carry(x, log_weight)]
        carrier = found.pop(at[0]) if at else nothing
        assert isinstance(carrier.term, Softmax)
        carrier = carrier._replace(term=replace(carrier.term, sink=name))
        found.insert(at[0] if at else len(found), carrier)
    return tuple(found)


def _may_carry(member: Member, log_weight: float) -> bool:
    """Whether a member can take a sink of this weight."""
    term = member.term
    free = isinstance(term, Softmax) and term.sink is None
    return free and member.log_weight == log_weight


def _sinks(term: Spec, log_weight: float = 0.0) -> dict[str, float]:
    """The sinks in a part of a joint, each with the weight of the first that has it."""
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
    """The members of a part of a joint, in units and without sinks.

    Raises:
      ValueError: a joint inside it with overlap="refuse" has a pair in two terms.
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
    # The keys of other terms may not be tokens, so dropout cannot draw by token.
    return [(Member(term, draw=None),)]


def _counted(parts: list[list[Unit]], problem: Problem) -> Unit:
    """All members as one unit; dropout draws anew for each part."""
    found: list[Member] = []
    first = 0
    for part in parts:
        for member in overlaps.settled(part, problem):
            draw = None if member.draw is None else member.draw + first
            found.append(member._replace(draw=draw, counts=True))
        first += _num_draws(part)
    return tuple(found)


def _num_draws(units: list[Unit]) -> int:
    """How many numbers of draws the units use."""
    return 1 + max((x.draw for u in units for x in u if x.draw is not None), default=-1)


def _numbered(units: list[Unit]) -> list[Unit]:
    """The units, where each member without a number of its draw gets a new one."""
    own = count(_num_draws(units) or 1)
    return [
        tuple(x._replace(draw=next(own)) if x.draw is None else x for x in unit)
        for unit in units
    ]
