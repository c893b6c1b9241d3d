"""Runs mixtures: each part by its own rule, then their merge, mean or gated sum."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

from lowering.problem import Problem
from sadsl.run import dropout_seeds, merging
from sadsl.run.attend import attend
from sadsl.run.options import problem_of
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import Spec, read_by
from sadsl.terms.mixtures import Average, Gated, Joint, Mixture, Weighted, members_of
from sadsl.terms.overlaps import Member

# Runs a part of a mixture on given arrays.
OfPart: TypeAlias = Callable[[Spec, Mapping[str, Any]], Outcome]


@attend.register(Joint)
@attend.register(Average)
@attend.register(Gated)
@attend.register(Weighted)
def _(term: Any, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """Each part on the arrays that it reads.

    Raises:
      ValueError: terms share pairs that cannot be given up, or gates do not fit.
    """

    def of_part(part: Spec, given: Mapping[str, Any]) -> Outcome:
        return attend(part, inputs, read_by(part, given), setting)

    return combined(term, inputs[0], given, problem_of(inputs, setting), of_part)


def combined(
    term: Any, q: Array, given: Mapping[str, Any], problem: Problem, of_part: OfPart
) -> Outcome:
    """The outcome of a mixture, whose parts ``of_part(part, given)`` runs.

    ``problem`` has the sizes of the whole call, of which ``q`` may be a shard.

    Raises:
      ValueError: terms share pairs that cannot be given up, or gates do not fit.
      TypeError: the term is no mixture.
    """
    match term:
        case Joint():
            # One softmax over all parts: disjoint members, merged.
            found = [
                _of_member(each, given, of_part) for each in members_of(term, problem)
            ]
            return found[0] if len(found) == 1 else merging.merge(found)
        case Average():
            return Outcome(merging.mean(_outputs(term, given, of_part)), None)
        case Gated():
            gates = gates_of(term, given, q)
            outputs = _outputs(term, given, of_part)
            return Outcome(merging.gated_sum(outputs, gates), None)
        case Weighted():
            return weighed(of_part(term.term, given), term.log_weight)
    raise TypeError(f"{term!r} is no mixture")


def _of_member(member: Member, given: Mapping[str, Any], of_part: OfPart) -> Outcome:
    mine = dropout_seeds.of_part(given, member.draw) if member.draw else given
    return weighed(of_part(member.term, mine), member.log_weight)


def _outputs(
    term: Mixture, given: Mapping[str, Any], of_part: OfPart
) -> tuple[Array, ...]:
    """The outputs of all parts; dropout draws anew for each part."""
    return tuple(
        of_part(part, dropout_seeds.of_part(given, i)).out
        for i, part in enumerate(term.terms)
    )


def weighed(found: Outcome, log_weight: float) -> Outcome:
    """The outcome of pairs that count ``exp(log_weight)`` times."""
    if found.lse is None or not log_weight:
        return found
    return found._replace(lse=found.lse + log_weight)


def gates_of(term: Gated, given: Mapping[str, Any], q: Array) -> Array:
    """The gates of a call, ``[batch or 1, q_seq, num_q_heads, terms]``.

    Raises:
      ValueError: the operand was not given, or has another shape.
    """
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
