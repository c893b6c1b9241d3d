"""Native sparse attention: gates weigh compressed, selected and near keys."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.catalog.nsa_topk import nsa_topk
from sadsl.maps.named import causal
from sadsl.maps.named import window as near
from sadsl.run import checks
from sadsl.run.compressed import shortened
from sadsl.selections import attended, scored
from sadsl.selections.base import Content
from sadsl.selections.cell_scores import cell_sides, in_steps, scorer
from sadsl.terms.compressed import Compressed, compressed
from sadsl.terms.mixtures import Gated, gated
from sadsl.terms.over import over

SHORT_K = "short_k"


def native_sparse_attention(
    k: int = 16, *, block: int = 64, length: int = 32, stride: int = 16,
    window: int = 512, first: int = 1, local: int = 2,
    key: str | None = None, value: str | None = None, score: str | None = None,
    own_keys: bool = False,
) -> Gated:  # fmt: skip
    """Gates three softmax branches: compressed blocks, selected blocks, and near keys.

    Yuan et al., Native sparse attention: hardware-aligned and natively trainable sparse
    attention, 2025, section 3; the defaults are those of its section 4.1. The gates,
    one for each query, head and branch, are the operand "gates", which layers learn
    from the input (a sigmoid of a projection). Blocks are selected by the attention of
    the compressed branch, once for the heads of a group.

    With ``own_keys=True`` each branch has keys and values of its own, as published:
    those of the call are selected, the operands "short_k" and "short_v" are those of
    the compressed blocks, ``[batch, blocks, num_kv_heads, head_dim]``, and "near_k" and
    "near_v" those of the window.

    Args:
      k: blocks that a query selects, forced ones included; see ``nsa_topk``.
      block: positions in a selected block.
      length: positions that are compressed into one.
      stride: positions between the starts of compressed blocks; divides ``block``.
      window: nearest keys of the third branch, besides the query's own.
      first, local: first and nearest blocks that are always selected.
      key, value: names of the functions that compress keys and values, as the paper
        learns them; the mean if None.
      score: name of an operand with scores, such as ``nsa_importance`` makes of a
        learned ``key``. If None, ``attended`` scores, over "short_k" or over means.
      own_keys: see above.

    Raises:
      ValueError: ``key`` or ``value`` is given with ``own_keys``.

    Example:
      >>> from sadsl import catalog
      >>> sizes = {"block": 8, "length": 8, "stride": 4}
      >>> spec = catalog.native_sparse_attention(4, window=16, **sizes)
      >>> for branch in spec.terms:
      ...     print(branch)
      compressed(length=8, stride=4)
      causal() & topk(4, block=8, block_q=1, score=attended(length=8, stride=4),
      scope='group', forced=sinks(8) | where(lambda q, k: (q // 8 - k // 8 <= 1) & (k <=
      q)), eligible=causal())
      causal() & window(16)
    """
    if own_keys and (key is not None or value is not None):
        raise ValueError(
            f"native_sparse_attention: key={key!r}, value={value!r} with own_keys=True:"
            f" pass what they would return as the operands {SHORT_K!r} and 'short_v'"
        )
    by_attention = scored(attended(length, stride, SHORT_K if own_keys else None))
    chosen_by = by_attention if score is None else score
    best = nsa_topk(k, block=block, first=first, local=local, score=chosen_by)
    short, nearest = compressed(length, stride, key, value), causal() & near(window)
    if not own_keys:
        return gated(short, best, nearest)
    short_of_call = over(SHORT_K, short.blocks, "short_v")
    return gated(short_of_call, best, over("near_k", nearest, "near_v"))


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

    The scores are the operand that ``native_sparse_attention(score=...)`` names: those
    of ``attended``, added up over the heads of a group, with the function of ``term``
    that compresses keys. A few queries are scored at a time.

    Args:
      q, k: as of the call of ``attention``; self-attention.
      term: the compressed branch, ``spec.terms[0]``.
      block: positions of a selected block, a multiple of the stride of ``term``.
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
    heads = q.shape[2]
    given = {SHORT_K: shortened(k, term, term.key, operands or {})}
    content = Content(jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2), given, scale)
    score = scored(attended(term.length, term.stride, SHORT_K))
    sides = cell_sides(1, block, content)
    queries, of_rows, cost = scorer(score, content, sides, None, heads)
    found = in_steps(of_rows, queries, cost)
    return found.reshape(len(found), k.shape[2], -1, *found.shape[2:]).sum(axis=2)


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
