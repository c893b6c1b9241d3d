"""Channel attention: softmax attention on the transposed tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.precision import wide
from sadsl.call_text import call_text
from sadsl.term import DROPOUT_KEY, Evaluate, Inputs, Outcome, Setting, Term

Scale = Literal["head_dim", "tokens"]


@dataclass(frozen=True, repr=False)
class Channel(Term):
    """The channels of a head attend to each other over all tokens; see ``channel``."""

    scale: Scale = "head_dim"

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise ValueError(
                f"channel: scale={self.scale!r} must be 'head_dim' or 'tokens'"
            )

    def reads(self, name: str) -> bool:
        """No array; dropout gets as far as the error that it cannot be."""
        return name == DROPOUT_KEY

    def __repr__(self) -> str:
        return call_text(self, by_position=1)


def channel(scale: Scale = "head_dim") -> Channel:
    """Each channel of a head is a mean of channels, weighted over the whole sequence.

    With the queries ``Q``, keys ``K`` and values ``V`` of a head, ``[n, d]`` each, the
    output is ``(softmax(s * Q^T K) V^T)^T``: the softmax runs over the ``d`` channels
    of the keys, and the cost is linear in ``n``. Heads are the channel groups (Ding et
    al., DaViT: dual attention vision transformers, 2022, section 3.2; its code swaps
    the names of the three projections, which is the same class of functions).

    It has no index map: every token of the output depends on all tokens, so it is
    bidirectional only; one length for queries and keys; one width for keys and values.
    There is no log-sum-exp of a query, so it cannot be part of ``joint``.

    Args:
      scale: ``s`` is the ``sm_scale`` of the call, whose default is the paper's
        ``head_dim ** -0.5``; "tokens" takes ``n ** -0.5``, whatever the call says, as
        the authors' later vision encoder does (Xiao et al., Florence-2, 2024).
    """
    return Channel(scale)


def attend(
    inputs: Inputs,
    term: Channel,
    given: Mapping[str, Any],
    setting: Setting,
    evaluate: Evaluate,
) -> Outcome:
    """Channel attention, the same on every backend: two products and a small softmax.

    Products accumulate in float32 (float64 for float64).

    Raises:
      ValueError: queries and keys differ in length, or keys and values in width.
      NotImplementedError: there is dropout on the weights, or a ``q_offset``.
    """
    del given, evaluate
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
            f"{setting.dropout_rate}: its weights are between channels; leave both 0"
        )
    scale = setting.sm_scale if term.scale == "head_dim" else q_seq**-0.5
    return Outcome(_attended(q, k, v, scale=scale), None)


@jax.jit
def _attended(q: Array, k: Array, v: Array, *, scale: Any) -> Array:
    heads, kv_heads, dim = q.shape[2], *k.shape[2:]
    products = partial(
        jnp.einsum, preferred_element_type=wide(q.dtype), precision="highest"
    )
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, dim)
    scores = products("bnhgc,bnhd->bhgcd", grouped, k) * scale
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = products("bhgcd,bnhd->bnhgc", weights, v)
    return out.reshape(q.shape).astype(q.dtype)
