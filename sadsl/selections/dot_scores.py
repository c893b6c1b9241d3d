"""``dot``: scores of pairs by products of arrays that a layer makes for this purpose.

DeepSeek-V3.2 calls the arrays an indexer. Its scores are those of an attention without
a softmax, added up over its heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.selections.base import Content

ACTS = (None, "relu")


@dataclass(frozen=True, repr=False)
class Dot:
    """A score of pairs; made by ``dot``."""

    q: str = "iq"
    k: str = "ik"
    weights: str | None = None
    act: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_operand_name("dot: q", self.q)
        check_operand_name("dot: k", self.k)
        if self.weights is not None:
            check_operand_name("dot: weights", self.weights, "None")
        if self.act not in ACTS:
            raise ValueError(f"dot: act={self.act!r} must be one of {ACTS}")
        if not np.isfinite(self.scale):
            raise ValueError(f"dot: scale={self.scale} must be finite")

    @property
    def operands(self) -> Mapping[str, int]:
        """The arrays that it reads, with their numbers of axes beside the batch."""
        found = {self.q: 3, self.k: 3}
        return found if self.weights is None else {**found, self.weights: 2}

    def __repr__(self) -> str:
        return call_text(self)


def dot(
    q: str = "iq",
    k: str = "ik",
    weights: str | None = None,
    act: str | None = None,
    scale: float = 1.0,
) -> Dot:
    """Scores each query and key by products of arrays of the call.

    The score is ``sum_j weights[q, j] * act(scale * q[q, j] . k[k, j])`` over the heads
    ``j`` of these arrays (DeepSeek-AI, DeepSeek-V3.2, 2025, section 2.1: the lightning
    indexer), in float32 whatever their dtype is. It is for ``topk``, ``threshold`` and
    ``mass``, which compute it for some queries at a time.

    A cell of several pairs gets the greatest score of its eligible pairs. If ``k`` has
    one row for each cell instead of one for each key, a cell has the score of its row:
    for keys that a layer has pooled.

    A score that is NaN or infinite counts as the greatest or the least finite number;
    NaN as the least. No gradient flows through a choice.

    Args:
      q: the name of the operand ``[batch or 1, q_seq, heads, dim]``. Its heads are
        split evenly among the choices: all heads add up to one choice with
        ``scope="shared"``; with "group" each key head has its share of them, with
        "query" each query head.
      k: the operand ``[batch or 1, kv_seq or cells, 1 or heads, dim]``.
      weights: the operand ``[batch or 1, q_seq, heads]``; 1 if None.
      act: "relu", or None for the product itself.
      scale: a factor of the product. It changes a choice only if it is negative, but
        also the loss of an indexer.

    Raises:
      ValueError: a name is not an identifier, or ``act`` is none of these.

    Example:
      >>> import sadsl as sa
      >>> score = dot("iq", "ik", weights="iw", act="relu")
      >>> sa.topk(2048, block=1, block_q=1, score=score, scope="shared").operands
      {'iq': 3, 'ik': 3, 'iw': 2}
    """
    return Dot(q, k, weights, act, float(scale))


class DotArrays(NamedTuple):
    """The arrays of a score, float32, by choice: ``heads`` are those of one choice."""

    q: Float[Array, "batch choices q heads dim"]
    weights: Float[Array, "batch choices q heads"] | None
    k: Float[Array, "batch choices_or_1 heads_or_1 keys dim"]


def arrays_of(score: Dot, content: Content, num_choices: int, cells: int) -> DotArrays:
    """The checked arrays of a call, for ``num_choices`` choices of each query.

    Raises:
      ValueError: an array was not given, or has the wrong shape or dtype.
    """
    lengths = content.q.shape[2], content.k.shape[2]
    q, k = (
        content.operand(score.q, "index queries"),
        content.operand(score.k, "index keys"),
    )
    heads, dim = q.shape[2:]
    _check(score.q, q, (lengths[0], None, None))
    if heads % num_choices:
        raise ValueError(
            f"operand {score.q!r} has {heads} heads: they must be a multiple of the "
            f"{num_choices} choices of a query; scope='shared' has one choice"
        )
    _check(score.k, k, (lengths[1] if k.shape[1] != cells else cells, None, dim))
    if k.shape[2] not in (1, heads):
        raise ValueError(
            f"operand {score.k!r} has {k.shape[2]} heads: it must have 1, or {heads} "
            f"as {score.q!r}"
        )
    each = heads // num_choices
    weights = None
    if score.weights is not None:
        weights = content.operand(score.weights, "the weights of index heads")
        _check(score.weights, weights, (lengths[0], heads))
        weights = weights.astype(jnp.float32)
        weights = jnp.moveaxis(weights.reshape(*weights.shape[:2], -1, each), 2, 1)
    q = q.astype(jnp.float32).reshape(*q.shape[:2], num_choices, each, dim)
    k = jnp.moveaxis(k.astype(jnp.float32), 2, 1)
    k = k[:, :, None] if k.shape[1] == 1 else k.reshape(len(k), -1, each, *k.shape[2:])
    return DotArrays(jnp.moveaxis(q, 2, 1), weights, k)


def _check(name: str, x: Array, wanted: tuple[int | None, ...]) -> None:
    shape = x.shape[1:]
    if any(w is not None and w != s for w, s in zip(wanted, shape, strict=True)):
        text = ", ".join("any" if w is None else str(w) for w in wanted)
        raise ValueError(
            f"operand {name!r} has shape {shape} without its batch axis: it must be "
            f"({text})"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"operand {name!r} has dtype {x.dtype}: it must be of floats")


def dot_scores(score: Dot, arrays: DotArrays) -> Float[Array, "batch choices q keys"]:
    """The scores of every query and key; callers pass some queries at a time.

    The heads follow one another: on XLA:CPU one product of all heads is two to four
    times slower, since it writes every product to memory.
    """
    q, weights, k = arrays
    batch = max(len(q), len(k))
    total = jnp.zeros((batch, q.shape[1], q.shape[2], k.shape[3]), jnp.float32)
    for head in range(q.shape[3]):
        key = k[:, :, min(head, k.shape[2] - 1)]
        own = _product(q[:, :, :, head], key) * score.scale
        if score.act == "relu":
            own = jax.nn.relu(own)
        total = total + (own if weights is None else own * weights[..., head, None])
    greatest = float(np.finfo(np.float32).max)
    return jnp.nan_to_num(total, nan=-greatest, posinf=greatest, neginf=-greatest)


def _product(
    q: Float[Array, "batch choices q dim"], k: Float[Array, "batch choices keys dim"]
) -> Float[Array, "batch choices q keys"]:
    if q.shape[:2] == (1, 1) and k.shape[:2] == (1, 1):
        # A plain matrix product: faster than a batched one on XLA:CPU.
        return jnp.matmul(q[0, 0], k[0, 0].T, precision="highest")[None, None]
    lead = max(len(q), len(k)), q.shape[1]
    q, k = (jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in (q, k))
    return jnp.einsum("bcqd,bckd->bcqk", q, k, precision="highest")
