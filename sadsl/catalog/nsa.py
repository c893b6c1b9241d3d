"""Native sparse attention: gates weigh compressed, selected and near keys."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sadsl.catalog.nsa_topk import MEAN_KEYS, nsa_topk
from sadsl.maps.named import causal
from sadsl.maps.named import window as near
from sadsl.run import checks
from sadsl.run.compressed import shortened
from sadsl.selections.cell_scores import in_steps, products, softmax
from sadsl.terms.compressed import Compressed, compressed
from sadsl.terms.mixtures import Gated, gated


def native_sparse_attention(
    k: int = 16, *, block: int = 64, length: int = 32, stride: int = 16,
    window: int = 512, first: int = 1, local: int = 2,
    key: str | None = None, value: str | None = None, score: str | None = None,
) -> Gated:  # fmt: skip
    """Gates three softmax branches: compressed blocks, selected blocks, and near keys.

    Yuan et al., Native sparse attention: hardware-aligned and natively trainable sparse
    attention, 2025, section 3; the defaults are those of its section 4.1. The gates,
    one for each query, head and branch, are the operand "gates", which layers learn
    from the input (a sigmoid of a projection). The branches share keys and values,
    where the paper projects them anew.

    Compressed and selected blocks rank alike where ``length == stride == block``.

    Args:
      k: blocks that a query selects, forced ones included; see ``nsa_topk``.
      block: positions in a selected block.
      length: positions that are compressed into one.
      stride: positions between the starts of compressed blocks.
      window: nearest keys of the third branch, besides the query's own.
      first, local: first and nearest blocks that are always selected.
      key, value: names of the functions that compress keys and values, as the paper
        learns them; the mean if None.
      score: name of an operand with the paper's own scores, see ``nsa_importance``; if
        None, blocks rank by their mean keys.

    Example:
      >>> from sadsl import catalog
      >>> sizes = {"block": 8, "length": 8, "stride": 8}
      >>> spec = catalog.native_sparse_attention(4, window=16, **sizes)
      >>> for branch in spec.terms:
      ...     print(branch)
      compressed(length=8, stride=8)
      causal() & topk(4, block=8, block_q=1, score=scored('mean',
      normalise='whole_softmax'), scope='group', forced=sinks(8) | where(lambda q, k: (q
      // 8 - k // 8 <= 1) & (k <= q)), eligible=causal())
      causal() & window(16)
    """
    chosen_by = MEAN_KEYS if score is None else score
    return gated(
        compressed(length, stride, key, value),
        nsa_topk(k, block=block, first=first, local=local, score=chosen_by),
        causal() & near(window),
    )


def nsa_importance(
    q: Float[Array, "batch seq num_q_heads head_dim"],
    k: Float[Array, "batch seq num_kv_heads head_dim"],
    term: Compressed,
    *,
    block: int = 64,
    sm_scale: float | None = None,
    operands: Mapping[str, Any] | None = None,
) -> Float[Array, "batch num_kv_heads seq blocks"]:
    """Scores each block by the attention that the compressed branch pays to it.

    The scores are the operand that ``native_sparse_attention(score=...)`` names. They
    are the softmax of ``term`` over compressed blocks, summed over the heads of a
    group. A compressed block adds its weight in proportion to the part of it, in
    strides, that lies in the selected block (Yuan et al., 2025, section 3.3.2,
    equations 8 to 10, "according to their spatial relationship"; the index that is
    printed there reaches before the block instead). A few queries are held in memory at
    a time.

    Args:
      q, k: as of the call of ``attention``; self-attention.
      term: the compressed branch, ``spec.terms[0]``.
      block: positions of a selected block.
      sm_scale: as of the call.
      operands: has the function that compresses keys, if any.

    Raises:
      ValueError: q and k are not of the same tokens.

    Example:
      >>> from functools import partial
      >>> import jax
      >>> from sadsl import catalog
      >>> sizes = {"block": 4, "length": 4, "stride": 4}
      >>> spec = catalog.native_sparse_attention(2, score="scores", **sizes)
      >>> q = jax.ShapeDtypeStruct((1, 12, 4, 8), "float32")
      >>> k = jax.ShapeDtypeStruct((1, 12, 2, 8), "float32")
      >>> score = partial(catalog.nsa_importance, term=spec.terms[0], block=4)
      >>> jax.eval_shape(score, q, k).shape  # the shape alone; nothing runs
      (1, 2, 12, 3)
    """
    scale = _checked_scale(q, k, sm_scale)
    seq, groups = k.shape[1], k.shape[2]
    short = shortened(k, term, term.key, operands or {})
    start = np.arange(short.shape[1])[:, None] * term.stride
    edge = np.arange(-(-seq // block))[None] * block
    inside = np.minimum(start + term.length, edge + block) - np.maximum(start, edge)
    share = jnp.asarray(np.maximum(inside, 0) / term.stride, jnp.float32)
    last = jnp.asarray(start[:, 0] + term.length - 1, jnp.int32)
    queries, keys = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, short))
    at = jnp.arange(seq, dtype=jnp.int32)[None, None]

    def of_rows(rows: Any) -> Float[Array, "batch groups rows blocks"]:
        past = last[None, None, None, :] <= rows["at"][..., None]
        p = softmax(products(rows["q"], keys) * scale, past)
        p = p.reshape(p.shape[0], groups, -1, *p.shape[2:]).sum(axis=2)
        return jnp.einsum("bgrc,cs->bgrs", p, share, precision="highest")

    cost = q.shape[0] * q.shape[2] * max(1, short.shape[1])
    return in_steps(of_rows, {"q": queries, "at": at}, cost)


def _checked_scale(q: Array, k: Array, sm_scale: float | None) -> Any:
    """The scale of a call of self-attention.

    Raises:
      ValueError: q and k are not of the same tokens.
    """
    checks.problem(q, k, k, 0)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"nsa_importance: q has {q.shape[1]} tokens, k has {k.shape[1]}: both must "
            "be of the same tokens (self-attention)"
        )
    return checks.scale(sm_scale, q.shape[-1])
