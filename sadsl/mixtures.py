"""Terms made of terms: one normaliser over all (``joint``), or a mean of outputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal, assert_never, get_args

import jax.numpy as jnp
from jaxtyping import Array

from lowering.pipeline import Problem
from sadsl import merging, overlaps
from sadsl.call_text import call_text
from sadsl.maps import IndexMap
from sadsl.term import (
    Evaluate,
    Inputs,
    Learned,
    Outcome,
    Setting,
    Sizes,
    Spec,
    Term,
    read_by,
)

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
        return overlaps.resolve(self.terms, self.overlap, problem)


@dataclass(frozen=True, repr=False)
class Average(Mixture):
    """The mean of the outputs. See ``average``."""


@dataclass(frozen=True, repr=False)
class Gated(Mixture):
    """The sum of the outputs, each times a gate. See ``gated``."""

    gates: str = "gates"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gates, str) or not self.gates.isidentifier():
            raise ValueError(
                f"gated: gates={self.gates!r} must be the name of an operand, a Python "
                "identifier; the array itself is passed as operands={name: array}"
            )

    @property
    def operands(self) -> Mapping[str, int]:
        """The gates: query, head and part."""
        return {self.gates: 3}

    def learned(self, sizes: Sizes) -> dict[str, Learned]:
        """A gate in (0, 1) for each query, head and part, and what the parts learn."""
        shape = sizes.num_q_heads, len(self.terms)
        gates = Learned(shape, per_query=True, squash="sigmoid")
        return {**super().learned(sizes), self.gates: gates}


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
    """
    return Joint(terms, overlap)


def average(*terms: Spec) -> Average:
    """The mean of the outputs of all terms (Ren et al., Combiner, 2021, section 4.4).

    A query that sees nothing in a term has output 0 there, which counts.
    """
    return Average(terms)


def gated(*terms: Spec, gates: str = "gates") -> Gated:
    """``sum_m gates[..., m] * out_m`` over the outputs of the terms.

    The operand ``gates`` is ``[batch or 1, q_seq, num_q_heads, terms]``, of floats that
    are used as they are; layers learn them, a sigmoid of a projection of each query's
    input (Yuan et al., Native sparse attention, 2025, section 3.2).
    """
    return Gated(terms, gates)


def weighted(term: Spec, log_weight: float) -> Weighted:
    """``term``, whose pairs count ``exp(log_weight)`` times in a joint.

    Its own output stays; its lse grows by ``log_weight``. So a sample of ``m`` of ``n``
    keys stands for all of them with ``log(n / m)`` (Han et al., HyperAttention, 2024).
    """
    return Weighted(term, float(log_weight))


def support_of(spec: Spec) -> IndexMap | None:
    """The pairs of a spec that share one normaliser, if it has one."""
    return spec if isinstance(spec, IndexMap) else spec.support


def _known(support: IndexMap | None) -> IndexMap:
    assert support is not None
    return support


def attend(
    inputs: Inputs, term: Joint | Average | Gated | Weighted,
    given: Mapping[str, Any], setting: Setting, evaluate: Evaluate,
) -> Outcome:  # fmt: skip
    """The parts of a mixture, each by its own rule, and what it makes of them.

    Raises:
      ValueError: terms of a joint share pairs that none can give up, or gates are
        missing or of another shape.
    """

    def each(parts: tuple[Spec, ...]) -> list[Outcome]:
        return [evaluate(inputs, p, read_by(p, given), setting) for p in parts]

    match term:
        case Joint():
            q, k, _ = inputs
            sizes = q.shape[1], k.shape[1]
            options = {"num_heads": q.shape[2], "q_offset": setting.q_offset}
            found = each(term.resolved(*sizes, **options))
            return found[0] if len(found) == 1 else merging.merge(found)
        case Average():
            return Outcome(merging.mean(tuple(x.out for x in each(term.terms))), None)
        case Gated():
            gates = _gates(term, given, inputs[0])
            outs = tuple(x.out for x in each(term.terms))
            return Outcome(merging.gated_sum(outs, gates), None)
        case Weighted():
            ((out, lse),) = each(term.parts)
            return Outcome(out, None if lse is None else lse + term.log_weight)
    assert_never(term)


def _gates(term: Gated, given: Mapping[str, Any], q: Array) -> Array:
    batch, length, heads, _ = q.shape
    wanted = length, heads, len(term.terms)
    if term.gates not in given:
        raise ValueError(
            f"{term!r} reads {term.gates!r}, which was not given: pass operands="
            f"{{{term.gates!r}: array}} of shape {(batch, *wanted)}, a gate for each "
            "query, head and term"
        )
    gates = jnp.asarray(given[term.gates])
    if gates.shape not in (wanted, (1, *wanted), (batch, *wanted)):
        raise ValueError(
            f"operand {term.gates!r} has shape {gates.shape}: the gates of {term!r} "
            f"must be [batch or 1, q_seq, num_q_heads, terms] of {(batch, *wanted)}"
        )
    return gates.reshape(-1, *wanted)
