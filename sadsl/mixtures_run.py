"""How mixtures run: their parts, each by its own rule, and what is made of them."""

from collections.abc import Mapping
from typing import Any, assert_never

import jax.numpy as jnp
from jaxtyping import Array

from lowering.pipeline import Problem
from sadsl import dropout, merging
from sadsl.mixtures import Average, Gated, Joint, Weighted, members_of
from sadsl.overlaps import Member
from sadsl.term import Evaluate, Inputs, Outcome, Setting, Spec, read_by


def attend(
    inputs: Inputs, term: Joint | Average | Gated | Weighted,
    given: Mapping[str, Any], setting: Setting, evaluate: Evaluate,
) -> Outcome:  # fmt: skip
    """The parts of a mixture, each by its own rule, and what it makes of them.

    Raises:
      ValueError: terms of a joint share pairs that none can give up, or gates are
        missing or of another shape.
    """

    def each(parts: tuple[Spec, ...]) -> tuple[Array, ...]:
        apart = enumerate(parts)
        mine = [(p, dropout.of_part(read_by(p, given), i)) for i, p in apart]
        return tuple(evaluate(inputs, p, arrays, setting).out for p, arrays in mine)

    def of_member(member: Member) -> Outcome:
        mine: Mapping[str, Any] = read_by(member.term, given)
        if member.draw:
            mine = dropout.of_part(mine, member.draw)
        out, lse = evaluate(inputs, member.term, mine, setting)
        return _weighed(out, lse, member.log_weight)

    match term:
        case Joint():
            q, k, _ = inputs
            lengths, heads = (q.shape[1], k.shape[1]), q.shape[2]
            problem = Problem(*lengths, heads, setting.q_offset)
            found = [of_member(member) for member in members_of(term, problem)]
            return found[0] if len(found) == 1 else merging.merge(found)
        case Average():
            return Outcome(merging.mean(each(term.terms)), None)
        case Gated():
            gates = _gates(term, given, inputs[0])
            return Outcome(merging.gated_sum(each(term.terms), gates), None)
        case Weighted():
            mine = read_by(term.term, given)
            return _weighed(
                *evaluate(inputs, term.term, mine, setting), term.log_weight
            )
    assert_never(term)


def _weighed(out: Array, lse: Array | None, log_weight: float) -> Outcome:
    return Outcome(out, lse if lse is None or not log_weight else lse + log_weight)


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
