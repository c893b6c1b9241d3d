"""How mixtures run: their parts, each by its own rule, and what is made of them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowering.problem import Problem
from sadsl.run import dropout_seeds, merging
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import read_by
from sadsl.terms.mixtures import Average, Gated, Joint, Mixture, Weighted, members_of
from sadsl.terms.overlaps import Member


@attend.register
def _(term: Joint, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """One softmax over the parts of a joint, merged by log-sum-exp.

    Raises:
      ValueError: terms share pairs that none can give up.
    """
    q, k, _ = inputs
    problem = Problem(q.shape[1], k.shape[1], q.shape[2], setting.q_offset)

    def of_member(member: Member) -> Outcome:
        mine: Mapping[str, Any] = read_by(member.term, given)
        if member.draw:
            mine = dropout_seeds.of_part(mine, member.draw)
        return _weighed(attend(member.term, inputs, mine, setting), member.log_weight)

    found = [of_member(member) for member in members_of(term, problem)]
    return found[0] if len(found) == 1 else merging.merge(found)


@attend.register
def _(
    term: Average, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """The mean of the outputs of the parts."""
    return Outcome(merging.mean(_outputs(term, inputs, given, setting)), None)


@attend.register
def _(term: Gated, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """The sum of the outputs of the parts, each times its gate.

    Raises:
      ValueError: the gates are missing, or of another shape.
    """
    gates = _gates(term, given, inputs[0])
    outputs = _outputs(term, inputs, given, setting)
    return Outcome(merging.gated_sum(outputs, gates), None)


@attend.register
def _(
    term: Weighted, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """The output of the term, and its lse with the weight."""
    mine = read_by(term.term, given)
    return _weighed(attend(term.term, inputs, mine, setting), term.log_weight)


def _outputs(
    term: Mixture, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> tuple[Array, ...]:
    """The outputs of all parts; each drops weights of its own."""
    shares = [read_by(part, given) for part in term.terms]
    keyed = (dropout_seeds.of_part(mine, i) for i, mine in enumerate(shares))
    return tuple(
        attend(part, inputs, mine, setting).out
        for part, mine in zip(term.terms, keyed, strict=True)
    )


def _weighed(found: Outcome, log_weight: float) -> Outcome:
    if found.lse is None or not log_weight:
        return found
    return found._replace(lse=found.lse + log_weight)


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
