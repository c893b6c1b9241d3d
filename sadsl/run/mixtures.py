"""Runs mixtures: each part by its own rule, then their merge, mean or gated sum."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sadsl.run import dropout_seeds, merging
from sadsl.run.attend import attend
from sadsl.run.options import problem_of
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import read_by
from sadsl.terms.mixtures import Average, Gated, Joint, Mixture, Weighted, members_of
from sadsl.terms.overlaps import Member


@attend.register
def _(term: Joint, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """One softmax over all parts: the outcomes of disjoint members, merged.

    Raises:
      ValueError: two terms share pairs, and the later one cannot give them up.
    """

    def of_member(member: Member) -> Outcome:
        mine: Mapping[str, Any] = read_by(member.term, given)
        if member.draw:
            mine = dropout_seeds.of_part(mine, member.draw)
        return weighed(attend(member.term, inputs, mine, setting), member.log_weight)

    members = members_of(term, problem_of(inputs, setting))
    found = [of_member(member) for member in members]
    return found[0] if len(found) == 1 else merging.merge(found)


@attend.register
def _(
    term: Average, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """The mean of the outputs of the parts."""
    return Outcome(merging.mean(_outputs(term, inputs, given, setting)), None)


@attend.register
def _(term: Gated, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """The sum of the outputs of the parts, each multiplied by its gate.

    Raises:
      ValueError: the gates are missing, or have another shape.
    """
    gates = gates_of(term, given, inputs[0])
    outputs = _outputs(term, inputs, given, setting)
    return Outcome(merging.gated_sum(outputs, gates), None)


@attend.register
def _(
    term: Weighted, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """The output of the term, and its lse plus the logarithm of the weight."""
    mine = read_by(term.term, given)
    return weighed(attend(term.term, inputs, mine, setting), term.log_weight)


def _outputs(
    term: Mixture, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> tuple[Array, ...]:
    """The outputs of all parts; dropout draws anew for each part."""
    shares = [read_by(part, given) for part in term.terms]
    keyed = (dropout_seeds.of_part(mine, i) for i, mine in enumerate(shares))
    return tuple(
        attend(part, inputs, mine, setting).out
        for part, mine in zip(term.terms, keyed, strict=True)
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
