"""Runs ``over``: the ordinary softmax, with entries in place of keys and values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import wide
from sadsl.run.attend import attend, choose
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import Spec, read_by
from sadsl.terms.over import Over
from sadsl.terms.softmax import Softmax


@attend.register
def _(term: Over, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """Output and lse over the entries.

    Raises:
      ValueError: the entries are missing, or have another shape or dtype.
    """
    q, _, _ = inputs
    keys = entries_of(term, term.source, given, q)
    if keys.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"operand {term.source!r} has head_dim {keys.shape[-1]}, q has "
            f"{q.shape[-1]}: must be equal"
        )
    inner, values = Softmax(term.map, term.logits_soft_cap), keys
    if term.values is None:
        # Entries that are their own values are loaded once.
        inner = replace(inner, values=(0, keys.shape[-1]))
    else:
        values = entries_of(term, term.values, given, q)
        if values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"operand {term.values!r} has shape {values.shape}, {term.source!r} "
                f"has {keys.shape}: all axes but the last must be equal"
            )
    return over_entries(inner, (q, keys, values), given, setting)


def over_entries(
    term: Spec, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Output and lse of q over entries, which have keys and values of their own.

    ``over`` takes its entries from a caller, ``compressed`` and ``summaries`` make
    theirs of the tokens. A query sees nothing where there are none.
    """
    q, keys, values = inputs
    if not keys.shape[1]:
        lse = jnp.full((len(q), q.shape[2], q.shape[1]), -jnp.inf, wide(q.dtype))
        return Outcome(jnp.zeros((*q.shape[:3], values.shape[-1]), q.dtype), lse)
    return attend(term, inputs, read_by(term, given), setting)


@choose.register
def _(
    term: Over, inputs: tuple[Array, Array], given: Mapping[str, Any], setting: Setting
) -> dict[str, Array]:
    """The choices among the entries."""
    q, _ = inputs
    keys = entries_of(term, term.source, given, q)
    inner = Softmax(term.map)
    return choose(inner, (q, keys), read_by(inner, given), setting)


def entries_of(
    term: Over, name: str, given: Mapping[str, Any], q: Array
) -> Float[Array, "batch entries heads dim"]:
    """An operand of entries, for every batch entry.

    Raises:
      ValueError: it was not given, or has another shape or dtype.
    """
    batch, _, heads, _ = q.shape
    if name not in given:
        raise ValueError(
            f"{term!r} reads {name!r}, which was not given: pass operands={{{name!r}: "
            "array}} of shape [batch, entries, num_kv_heads, head_dim]"
        )
    found = jnp.asarray(given[name])
    found = found[None] if found.ndim == 3 else found
    fits = found.ndim == 4 and found.shape[0] in (1, batch)
    if not fits or heads % max(1, found.shape[2]):
        raise ValueError(
            f"operand {name!r} has shape {found.shape}: it must be [batch or 1, "
            f"entries, heads, head_dim], of batch {batch}, with heads that divide "
            f"the {heads} of q"
        )
    if found.dtype != q.dtype:
        raise ValueError(
            f"operand {name!r} has dtype {found.dtype}, q has {q.dtype}: cast them to "
            "one dtype"
        )
    return jnp.broadcast_to(found, (batch, *found.shape[1:]))
