"""The arrays of a recurrence of ``linear``: features, decays, and a bonus."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pallas_kernels import linear as kernels
from sadsl.run.linear import TokenArrays, prepared
from sadsl.run.linear_operands import features_of, float_operand, log_decays
from sadsl.run.recurrence import Arrays
from sadsl.run.types import Setting
from sadsl.terms.base import STATE
from sadsl.terms.linear import Linear


@prepared.register
def _(
    term: Linear, found: TokenArrays, given: Mapping[str, Any], setting: Setting
) -> tuple[Arrays, kernels.Recurrence]:
    q, k, v = found.q, found.k, found.v
    if term.scaled:
        q = (q * setting.sm_scale).astype(q.dtype)
    phi = features_of(term, given)
    before = given.get(STATE)
    past = 0 if before is None or before.position is None else before.position
    rows = past + found.q_offset + jnp.arange(q.shape[1])
    fq, fk = phi(q, "q", rows), phi(k, "k", past + jnp.arange(k.shape[1]))
    if fq.shape[-1] != fk.shape[-1]:
        raise ValueError(
            f"{term!r}: the feature map yields {fq.shape[-1]} features of q and "
            f"{fk.shape[-1]} of k: the two numbers must be equal"
        )
    decay = log_decays(term, given, (q, fk, v), found.q_offset)
    if term.read == "before" and decay is not None and decay.ndim == 3:
        # Only factors by channel have a form without the own step.
        decay = jnp.broadcast_to(decay[..., None], (*decay.shape, fk.shape[-1]))
    bonus = None
    if term.bonus is not None:
        heads = k.shape[2]
        x = float_operand(term, given, term.bonus, (1, None, fk.shape[-1]), "a bonus")
        if x.shape[1] not in (1, heads, v.shape[2], q.shape[2]):
            raise ValueError(
                f"operand {term.bonus!r} has shape {x.shape[1:]}: a bonus must be "
                f"[heads, features], with the {heads} heads of k"
            )
        bonus = x[0]
    eps = term.eps if term.normalise is True else None
    rule = kernels.Recurrence(eps=eps, read_before=term.read == "before")
    return Arrays(fq, fk, v.astype(fk.dtype), None, decay, bonus), rule
