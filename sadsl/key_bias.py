"""A number added to the scores of a key: one more feature of queries and keys.

``[q, 1] . [k, b / sm_scale] * sm_scale = q . k * sm_scale + b``, so that every backend
has the bias, and its gradient, from the product that it computes anyway. That is for
callers with the array at hand and no soft cap. ``softmax(map, bias=key_bias(name))``
says the same in a spec: after a soft cap, for every query head of its own, and with the
product as it is, at the price of a vector that the kernels read.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.attention import as_term, attention, select
from sadsl.selections.content import selections_of
from sadsl.term import Spec

# Features that hold a float32 together, each rounded to what the one before left over.
PIECES = {"float32": 1, "bfloat16": 3, "float16": 3, "float64": 1}


def attention_with_key_bias(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    v: Float[Array, "batch kv_seq num_kv_heads head_dim_v"],
    spec: Spec | str,
    bias: Float[Array, "batch_or_1 num_kv_heads kv_seq"],
    *,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    **options: Any,
) -> Any:
    """``attention`` with ``bias[b, h, k]`` added to the scaled scores of key ``k``.

    Finite floats ``[batch or 1, num_kv_heads or 1, kv_seq_len]``; gradients reach it.
    What the selections of ``spec`` choose is decided by q and k as they were given. In
    bfloat16 and float16 the bias is spread over three features, and keeps its digits.

    Args:
      q, k, v, spec, operands, sm_scale: as of ``attention``; the default scale is that
        of the given head_dim.
      bias: the numbers to add.
      options: what else ``attention`` takes.

    Raises:
      ValueError: the bias is of another shape, or sm_scale is 0.
      NotImplementedError: the spec has a soft cap, which a bias must come after.
    """
    term = as_term(spec)
    if term.logits_soft_cap is not None:
        raise NotImplementedError(
            f"logits_soft_cap={term.logits_soft_cap} with a key bias: the bias is "
            "added after the cap, but as a feature of the keys it would be capped "
            "too; leave out one of them"
        )
    scale = float(q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    _check(bias, k, scale)
    if selections_of(term):
        chosen = select(
            term, q, k, operands=operands, sm_scale=scale,
            q_offset=options.get("q_offset", 0),
        )  # fmt: skip
        operands = {**(operands or {}), **chosen}
    wide_q, wide_k = with_key_bias(q, k, bias, scale)
    return attention(
        wide_q, wide_k, v, term, operands=operands, sm_scale=scale, **options
    )


def with_key_bias(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    bias: Float[Array, "batch_or_1 heads_or_1 kv_seq"],
    sm_scale: float,
) -> tuple[Array, Array]:
    """q and k with the features whose products, times ``sm_scale``, are the bias."""
    wide = jnp.float64 if k.dtype == jnp.float64 else jnp.float32
    rest = jnp.swapaxes(bias, 1, 2).astype(wide) / sm_scale
    info = jnp.finfo(k.dtype)
    pieces = []
    for _ in range(PIECES[k.dtype.name]):
        # Rounded by a primitive: a cast there and back may be taken for no change.
        piece = jax.lax.reduce_precision(rest, info.nexp, info.nmant)
        pieces.append(piece.astype(k.dtype))
        rest = rest - piece
    of_key = jnp.stack(pieces, axis=-1)
    of_key = jnp.broadcast_to(of_key, (*k.shape[:3], len(pieces)))
    of_query = jnp.ones((*q.shape[:3], len(pieces)), q.dtype)
    wide_q = jnp.concatenate([q, of_query], axis=-1)
    return wide_q, jnp.concatenate([k, of_key], axis=-1)


def _check(bias: Array, k: Array, scale: float) -> None:
    batch, length, heads, _ = k.shape
    shape = bias.shape
    fits = len(shape) == 3 and shape[2] == length
    if not fits or shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(
            f"bias has shape {shape}: it must be [batch or 1, num_kv_heads or 1, "
            f"kv_seq] of {(batch, heads, length)}; for a bias of each query head, "
            "repeat k and v over the heads of q"
        )
    if scale == 0:
        raise ValueError(
            "sm_scale=0.0 with a key bias: the bias is a feature of the keys, and is "
            "scaled as they are; pass another scale and zero queries"
        )
