"""Sparsifiner: a vision transformer whose keys are guessed by a low-rank map."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.maps.base import IndexMap
from sadsl.selections.factorised_topk import Predictor, factorised_topk, predicted


def sparsifiner(
    keep: float = 0.25,
    coefs: int = 8,
    threshold: float = 0.02,
    scale: float | None = None,
) -> IndexMap:
    """The best ``keep`` of the keys by a learned guess; the class token sees all.

    Wei et al., Sparsifiner: learning sparse instance-dependent attention for efficient
    vision transformers, 2023, section 3. The rank of the guess is the number of tokens
    over 6, its width half of head_dim; the operands are those of ``factorised_topk``.
    """
    return factorised_topk(keep, coefs, threshold, scale=scale)


def sparsifiner_loss(
    q: Float[Array, "batch n heads head_dim"],
    k: Float[Array, "batch n heads head_dim"],
    operands: Mapping[str, Array],
    *,
    target: Float[Array, "batch heads n n"] | None = None,
    sm_scale: float | None = None,
    scale: float | None = None,
    full_rows: int = 1,
) -> Float[Array, ""]:
    """The mean squared distance of the guess from the attention that it stands for.

    The whole guess is trained, before anything of it is cut to 0; rows that see all
    keys do not count. ``operands`` are the weights ``predictor_...`` without a batch
    axis. ``target`` is a teacher's attention, or that of q and k; no gradient flows to
    it. The released code adds the squares up instead.
    """
    head_dim = q.shape[-1]
    logit_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    q, k = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, k))
    weights = Predictor(*(operands[f"predictor_{x}"][None] for x in Predictor._fields))
    guess = predicted(q, k, weights, logit_scale if scale is None else scale)
    if target is None:
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest")
        target = jax.nn.softmax(scores * logit_scale, axis=-1)
    gap = guess - jax.lax.stop_gradient(target).astype(jnp.float32)
    return jnp.mean(jnp.square(gap[:, :, full_rows:]))
