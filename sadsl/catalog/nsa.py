"""Native sparse attention: compressed, selected and near keys, weighed by gates."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sadsl.catalog.nsa_topk import MEAN_KEYS, nsa_topk
from sadsl.maps.named import causal
from sadsl.maps.named import window as near
from sadsl.run.compressed import shortened
from sadsl.selections.cell_scores import in_steps, products, softmax
from sadsl.terms.compressed import Compressed, compressed
from sadsl.terms.mixtures import Gated, gated


def native_sparse_attention(
    k: int = 16, *, block: int = 64, length: int = 32, stride: int = 16,
    window: int = 512, first: int = 1, local: int = 2,
    key: str | None = None, value: str | None = None, score: str | None = None,
) -> Gated:  # fmt: skip
    """Three branches, each a softmax of its own, and a gate a query, head and branch.

    Yuan et al., Native sparse attention: hardware-aligned and natively trainable sparse
    attention, 2025, section 3; the defaults are those of its section 4.1. The gates are
    the operand "gates", which layers learn from the input (a sigmoid of a projection).

    Compressed: ``length`` positions as one, every ``stride``; ``key`` and ``value``
    name functions that do it, as the paper learns them; without, it is by the mean.
    Selected: ``nsa_topk(k, block=block, ...)``, by the mean keys of whole blocks;
    ``score`` names an operand of the paper's own scores, see ``nsa_importance``. The
    two rank alike where ``length == stride == block``. Near: the last ``window`` keys,
    and the own. The branches share keys and values, where the paper projects them anew.
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
    """What the compressed branch attends to in each block, summed over a group's heads.

    The operand that ``native_sparse_attention(score=...)`` names: the softmax of
    ``term`` over compressed blocks, each adding what it gives in proportion to the part
    of it, in strides, that lies in the block (Yuan et al., 2025, section 3.3.2,
    equations 8 to 10, "according to their spatial relationship"; the index that is
    printed there reaches before the block instead). A few queries are held at a time.

    Args:
      q, k: as of the call of ``attention``; self-attention.
      term: the compressed branch, ``spec.terms[0]``.
      block: positions of a selected block.
      sm_scale: as of the call.
      operands: the function that compresses keys, if the term names one.
    """
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    seq, groups = k.shape[1], k.shape[2]
    short = shortened(k, term, term.key, operands or {})
    start = np.arange(short.shape[1])[:, None] * term.stride
    edge = np.arange(-(-seq // block))[None, :] * block
    inside = np.minimum(start + term.length, edge + block) - np.maximum(start, edge)
    share = jnp.asarray(np.maximum(inside, 0) / term.stride, jnp.float32)
    last = jnp.asarray(start[:, 0] + term.length - 1, jnp.int32)
    by_head = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, short))
    queries, keys = by_head
    at = jnp.arange(seq, dtype=jnp.int32)[None, None]

    def of_rows(rows: Any) -> Float[Array, "batch groups rows blocks"]:
        past = last[None, None, None, :] <= rows["at"][..., None]
        p = softmax(products(rows["q"], keys) * scale, past)
        p = p.reshape(p.shape[0], groups, -1, *p.shape[2:]).sum(axis=2)
        return jnp.einsum("bgrc,cs->bgrs", p, share, precision="highest")

    cost = q.shape[0] * q.shape[2] * max(1, short.shape[1])
    return in_steps(of_rows, {"q": queries, "at": at}, cost)
