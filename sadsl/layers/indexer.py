"""The loss that trains an indexer: the KL divergence from attention to its scores.

The target of a query is its attention, added up over heads and divided by its sum; the
scores become a distribution by a softmax. In the dense warm-up both go over all keys
that the query may see, in sparse training over the chosen keys (DeepSeek-AI,
DeepSeek-V3.2, 2025, section 2.1). No gradient flows to the attention.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sadsl.run.key_mass import key_mass
from sadsl.selections.dot_scores import Dot
from sadsl.selections.listed_scores import listed_scores


def indexer_loss(
    score: Dot,
    operands: Mapping[str, Any],
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "*batch_or_1 kv_seq num_kv_heads head_dim"],
    lse: Float[Array, "batch num_q_heads q_seq"],
    listed: Int[Array, "batch_or_1 groups q_seq keys"],
    *,
    sm_scale: float | None = None,
) -> Float[Array, ""]:
    """The mean over queries of ``KL(attention over listed keys || softmax(scores))``.

    In sparse training, ``listed`` is what the attention saw: ``select`` returns it. In
    the dense warm-up it lists all keys that a query may see; ``causal_lists`` does.

    An indexer that chooses entries of ``over(...)``, as that of DeepSeek-V4, learns
    from the weight of the entries: pass them for ``k``, and the lse of the joint.

    Args:
      score: the score of the choice.
      operands: the arrays of ``score``; the gradient flows to them.
      q, lse, sm_scale: of the attention, without a gradient.
      k: its keys, or its entries.
      listed: as in ``key_mass``.

    Returns:
      A float32 scalar. Queries that see none of their listed keys count as 0,
      and so does a sequence without entries.

    Raises:
      ValueError: the shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x, iq = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8))
      >>> _, lse = sa.attention(x, x, x, sa.causal(), return_lse=True)
      >>> arrays = {"iq": iq, "ik": jnp.zeros((1, 4, 1, 8))}
      >>> indexer_loss(sa.dot(), arrays, x, x, lse, causal_lists(4)).round(6) + 0
      Array(0., dtype=float32)
    """
    if not k.shape[-3]:
        return jnp.zeros((), jnp.float32)
    target = key_mass(q, k, lse, listed, sm_scale=sm_scale)
    scores = listed_scores(score, operands, listed)
    real = (listed >= 0) & (listed < k.shape[-3])
    return divergence(target, scores, real)


def divergence(
    target: Float[Array, "batch groups q_seq keys"],
    scores: Float[Array, "batch groups q_seq keys"],
    real: Array,
) -> Float[Array, ""]:
    """The mean of ``KL(target / sum(target) || softmax(scores))`` over the queries.

    Args:
      target: weights of at least 0.
      scores: logits.
      real: bool, which entries exist; broadcasts against ``scores``.

    Example:
      >>> import jax.numpy as jnp
      >>> target = jnp.array([[[[3.0, 1.0]]]])
      >>> abs(divergence(target, jnp.log(target), target > 0)) < 1e-6
      Array(True, dtype=bool)
    """
    total = jnp.sum(target, axis=-1, keepdims=True)
    share = target / jnp.where(total == 0, 1.0, total)
    there = jnp.broadcast_to(real, scores.shape) & (total > 0)
    logits = jnp.where(there, scores, -jnp.inf)
    some = jnp.any(there, axis=-1, keepdims=True)
    norm = jax.nn.logsumexp(jnp.where(some, logits, 0.0), axis=-1, keepdims=True)
    log_ratio = jnp.log(jnp.where(share > 0, share, 1.0)) - (scores - norm)
    terms = jnp.where(there & (share > 0), share * log_ratio, 0.0)
    return jnp.mean(jnp.sum(terms, axis=-1))


def causal_lists(length: int, ratio: int = 1) -> Int[Array, "1 1 length entries"]:
    """All keys of each query of a causal map, for the dense warm-up.

    With a ``ratio``, they are the entries of so many tokens each that end by the query,
    as ``where(lambda q, k: k < (q + 1) // ratio)`` has them. Memory grows with the
    square of the length.

    Example:
      >>> causal_lists(3)[0, 0].tolist()
      [[0, 3, 3], [0, 1, 3], [0, 1, 2]]
      >>> causal_lists(5, ratio=2)[0, 0].tolist()
      [[2, 2], [0, 2], [0, 2], [0, 1], [0, 1]]
    """
    count = length // ratio
    at = jnp.arange(count, dtype=jnp.int32)[None]
    whole = (jnp.arange(length, dtype=jnp.int32)[:, None] + 1) // ratio
    return jnp.where(at < whole, at, count)[None, None]
