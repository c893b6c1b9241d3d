"""The loss of an indexer whose choice is of cells: of single keys, blocks or pools.

``sadsl.layers.indexer`` has the loss of single keys, which is published. Here it is the
same for cells of several keys: the target of a cell is the attention of its keys, and
its score that of its pooled key, or the greatest of those of its keys that the query
may see, as the choice itself has it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lowering.expr import evaluate
from pallas_kernels.lists.call import num_blocks
from sadsl.layers.indexer import divergence
from sadsl.maps.base import IndexMap
from sadsl.run.key_mass import key_mass
from sadsl.selections.budgets import TopK
from sadsl.selections.dot_scores import Dot
from sadsl.selections.listed_scores import listed_scores


class Attention(NamedTuple):
    """The attention that an indexer learns from: a call without its values."""

    q: Float[Array, "batch q_seq heads dim"]
    k: Float[Array, "batch kv_seq kv_heads dim"]
    lse: Float[Array, "batch heads q_seq"]
    sm_scale: float


def choice_loss(
    choice: TopK,
    operands: Mapping[str, Array],
    call: Attention,
    listed: Int[Array, "batch groups q_seq cells"] | None,
) -> Float[Array, ""]:
    """The mean over queries of ``KL(attention over cells || softmax(scores))``.

    Args:
      choice: scores cells by ``dot`` and has eligible pairs.
      operands: the arrays of its score; the gradient flows to them.
      call: what the attention of the layer was.
      listed: the chosen cells, as ``select`` returns them; None: all eligible cells.

    Raises:
      ValueError: the choice has no eligible pairs.
      NotImplementedError: queries share a choice in blocks.
    """
    score, block = choice.score.by, choice.block
    if choice.eligible is None:
        raise ValueError(
            f"{choice!r} has eligible=None, so the loss would count keys that a query "
            "cannot see: say which may be chosen, as in eligible=causal()"
        )
    if not isinstance(score, Dot) or not isinstance(block, int) or choice.rows != 1:
        raise NotImplementedError(
            f"the loss of {choice!r}: it needs score=dot(...), a block of a known "
            "size, and block_q=1"
        )
    n_q, n_k = call.q.shape[1], call.k.shape[1]
    cells = num_blocks(n_k, block)
    if listed is None:
        every = jnp.arange(cells, dtype=jnp.int32)
        groups = _groups(choice, call)
        listed = jnp.broadcast_to(every, (1, groups, n_q, cells))
    inside = jnp.arange(block, dtype=jnp.int32)
    keys = listed[..., None] * block + inside.reshape(1, 1, 1, 1, block)
    seen = _eligible(choice.eligible, keys) & (keys < n_k) & (listed < cells)[..., None]
    flat = jnp.where(seen, keys, n_k).reshape(*listed.shape[:3], -1)
    mass = key_mass(call.q, call.k, call.lse, flat, sm_scale=call.sm_scale)
    mass = jnp.sum(mass.reshape(*mass.shape[:3], -1, block), axis=-1)
    if operands[score.k].shape[1] == cells:
        scores = listed_scores(score, operands, listed)
    else:
        scores = listed_scores(score, operands, flat)
        scores = _greatest(scores.reshape(*scores.shape[:3], -1, block), seen)
    return divergence(mass, scores, jnp.any(seen, axis=-1))


def _groups(choice: TopK, call: Attention) -> int:
    """How many choices a query has."""
    heads = call.q.shape[2], call.k.shape[2]
    return {"shared": 1, "group": heads[1], "query": heads[0]}[choice.scope]


def _eligible(
    map: IndexMap, keys: Int[Array, "batch groups q_seq cells block"]
) -> Bool[Array, "batch groups q_seq cells block"]:
    """Whether each query may see listed keys."""
    at = jnp.arange(keys.shape[2], dtype=jnp.int32).reshape(1, 1, -1, 1, 1)
    zero = jnp.zeros_like(keys)
    places = evaluate.Jax(q=at + zero, k=keys, h=zero)
    return jnp.broadcast_to(evaluate.evaluate(map.node, places), keys.shape)


def _greatest(
    scores: Float[Array, "batch groups q_seq cells block"], seen: Array
) -> Float[Array, "batch groups q_seq cells"]:
    """The greatest score of the keys that are seen; any number where none is."""
    least = jnp.finfo(scores.dtype).min
    return jnp.max(jnp.where(seen, scores, least), axis=-1)
