"""Runs channel attention: softmax attention on the transposed tensor."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.precision import wide
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.channel import Channel


@attend.register
def _(
    term: Channel, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Channel attention: two products and a small softmax, in XLA on every backend.

    Products accumulate in float32 (float64 for float64).

    Raises:
      ValueError: queries and keys differ in length, or keys and values in width.
      NotImplementedError: the call has dropout or a ``q_offset``.
    """
    del given
    q, k, v = inputs
    (_, q_seq, _, dim), (_, kv_seq, _, dim_v) = q.shape, v.shape
    if q_seq != kv_seq or dim_v != dim:
        raise ValueError(
            f"{term!r} with {q_seq} queries and {kv_seq} keys, head_dim {dim} and "
            f"head_dim_v {dim_v}: channels attend to channels of the same tokens, so "
            "the lengths must be equal, and the widths too"
        )
    if setting.q_offset or setting.dropout_rate:
        raise NotImplementedError(
            f"{term!r} with q_offset={setting.q_offset}, dropout_rate="
            f"{setting.dropout_rate}: its weights are between channels, not between "
            "tokens; leave both 0"
        )
    scale = setting.sm_scale if term.scale == "head_dim" else q_seq**-0.5
    return Outcome(_attended(q, k, v, scale=scale), None)


@jax.jit
def _attended(q: Array, k: Array, v: Array, *, scale: Any) -> Array:
    """``(softmax(scale * q^T k) v^T)^T`` for each head, shaped like ``q``."""
    heads, kv_heads, dim = q.shape[2], *k.shape[2:]
    products = partial(
        jnp.einsum, preferred_element_type=wide(q.dtype), precision="highest"
    )
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, dim)
    scores = products("bnhgc,bnhd->bhgcd", grouped, k) * scale
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = products("bhgcd,bnhd->bnhgc", weights, v)
    return out.reshape(q.shape).astype(q.dtype)
