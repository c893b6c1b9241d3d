"""Sparsifiner: a vision transformer that predicts its keys by a low-rank map."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.maps.base import IndexMap
from sadsl.run import checks
from sadsl.selections.factorised_topk import Predictor, factorised_topk, predicted


def sparsifiner(
    keep: float = 0.25,
    coefs: int = 8,
    threshold: float = 0.02,
    scale: float | None = None,
) -> IndexMap:
    """A query sees the best ``keep`` of the keys by a learned guess of its attention.

    Wei et al., Sparsifiner: learning sparse instance-dependent attention for efficient
    vision transformers, 2023, section 3. The class token, the first one, sees all keys.
    The rank of the guess is the number of tokens over 6, its width half of head_dim.
    The operands are those of ``factorised_topk``.

    Args:
      keep: share of the keys that a query sees, from 0 to 1.
      coefs: largest coefficients that the guess keeps.
      threshold: entries of the basis up to this size count as 0.
      scale: factor of the scores that choose; that of the call if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.sparsifiner(0.5)
      factorised_topk(keep=0.5)
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
    """The mean squared error of the learned guess against the attention it predicts.

    The whole guess is trained, before small entries are cut to 0. No gradient flows to
    the target. The released code sums the squares instead.

    Wei et al., Sparsifiner, 2023, section 3.

    Args:
      q, k: as in ``sadsl.attention``, with as many key heads as query heads.
      operands: the weights ``predictor_...`` of ``factorised_topk``, without a batch
        axis.
      target: attention weights of a teacher; those of q and k if None.
      sm_scale: factor of the target's scores; ``head_dim ** -0.5`` if None.
      scale: factor of the guess's scores; ``sm_scale`` if None.
      full_rows: first rows, which see all keys and do not count.

    Example:
      >>> import jax
      >>> from sadsl import catalog
      >>> array = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
      >>> q, weight, table = array(1, 6, 2, 4), array(2, 5, 2), array(6, 1)
      >>> weights = {"q": weight, "k": weight, "down": table, "basis": table}
      >>> operands = {f"predictor_{name}": x for name, x in weights.items()}
      >>> jax.eval_shape(catalog.sparsifiner_loss, q, q, operands).shape
      ()
    """
    head_dim = q.shape[-1]
    logit_scale = checks.scale(sm_scale, head_dim)
    q, k = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, k))
    weights = Predictor(*(operands[f"predictor_{x}"][None] for x in Predictor._fields))
    guess = predicted(q, k, weights, logit_scale if scale is None else scale)
    if target is None:
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest")
        target = jax.nn.softmax(scores * logit_scale, axis=-1)
    gap = guess - jax.lax.stop_gradient(target).astype(jnp.float32)
    return jnp.mean(jnp.square(gap[:, :, full_rows:]))
