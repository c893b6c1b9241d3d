"""Finds the boundaries of chunks from attention weights, as labels for a predictor.

Xiong et al., Long-context modeling with dynamic hierarchical sparse attention for
on-device LLMs, 2025, section 3.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.loops import repeat
from pallas_kernels.varying import vary
from sadsl.selections.cell_scores import softmax

ROUNDING = 1e-6


def teacher_boundaries(
    q: Float[Array, "batch length num_q_heads head_dim"],
    k: Float[Array, "batch length num_kv_heads head_dim"],
    *,
    window: int = 4,
    threshold: float = 1.1,
    suppress: int = 8,
    max_boundaries: int | None = None,
) -> Int32[Array, "batch length"]:
    """Marks with 1 the positions where a chunk begins, for ``chunk_budget``.

    Xiong et al., DHSA, 2025, section 3. For each position ``c``, it compares the causal
    attention, averaged over heads, that later queries (from ``c + window`` on) give to
    the ``window`` keys up to ``c`` and to the ``window`` keys after ``c``. A chunk may
    begin at ``c + 1`` if one is more than ``threshold`` times the other. The greatest
    ratios are taken first. A chunk begins at position 0, and none near to the ends.
    Memory: ``length`` times about a hundred. It is not differentiable.

    Args:
      q: queries ``[batch, length, num_q_heads, head_dim]``.
      k: keys ``[batch, length, num_kv_heads, head_dim]``.
      window: the number of keys on each side.
      threshold: the ratio that a boundary must exceed.
      suppress: no boundary is within this distance of one with a greater ratio.
      max_boundaries: the most boundaries of a batch entry; None does not limit them.

    Returns:
      int32 ``[batch, length]``, pass it as ``operands={"boundaries": ...}``.

    Raises:
      ValueError: the shapes of q and k do not fit together, or a size is too small.

    Example:
      >>> import numpy as np
      >>> teacher_boundaries(np.zeros((1, 8, 1, 4)), np.zeros((1, 9, 1, 4)))
      Traceback (most recent call last):
      ValueError: teacher_boundaries: q has shape (1, 8, 1, 4), k (1, 9, 1, 4): batch,
        length and head_dim must be equal, the heads of q a multiple of those of k
    """
    batch, length, num_heads, dim = q.shape
    if k.shape[:2] != (batch, length) or num_heads % k.shape[2] or k.shape[3] != dim:
        raise ValueError(
            f"teacher_boundaries: q has shape {q.shape}, k {k.shape}: batch, length "
            "and head_dim must be equal, the heads of q a multiple of those of k"
        )
    if window < 1 or suppress < 0:
        raise ValueError(
            f"teacher_boundaries: window={window} must be at least 1, and "
            f"suppress={suppress} at least 0"
        )
    most = length if max_boundaries is None else max_boundaries
    ratio = mass_ratio(q, k, window)
    pick = partial(_pick, suppress=suppress, most=most)
    return jax.vmap(pick)(ratio, ratio > threshold).astype(jnp.int32)


def _pick(
    ratio: Float[Array, " length"],
    candidate: Bool[Array, " length"],
    suppress: int,
    most: int,
) -> Bool[Array, " length"]:
    """Picks candidates by ratio, none near to one picked before; marks the next key."""
    length = len(ratio)
    order = jnp.argsort(jnp.where(candidate, -ratio, jnp.inf), stable=True)

    def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        taken, blocked = state
        c = order[i]
        free = candidate[c] & ~blocked[c + suppress] & (taken.sum() < most)
        near = jax.lax.dynamic_slice_in_dim(blocked, c, 2 * suppress + 1)
        blocked = jax.lax.dynamic_update_slice_in_dim(blocked, near | free, c, 0)
        return taken.at[c].set(free), blocked

    state = jnp.zeros(length, bool), jnp.zeros(length + 2 * suppress, bool)
    taken, _ = repeat(length, visit, vary(state, ratio, candidate))
    return jnp.roll(taken, 1).at[0].set(True)


def mass_ratio(
    q: Float[Array, "batch length num_q_heads head_dim"],
    k: Float[Array, "batch length num_kv_heads head_dim"],
    window: int,
) -> Float[Array, "batch length"]:
    """The ratio that ``teacher_boundaries`` compares, 0 near the ends.

    The sum of a column from a row near the diagonal downwards is the sum of the whole
    column less a few entries, so one pass over blocks of rows is enough.
    """
    batch, length, num_heads, dim = q.shape
    group = num_heads // k.shape[2]
    keys = jnp.repeat(jnp.swapaxes(k, 1, 2).astype(jnp.float32), group, axis=1)
    block = min(64, length)
    spare = -length % block
    queries = jnp.swapaxes(q, 1, 2).astype(jnp.float32) * dim**-0.5
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, spare), (0, 0)))
    queries = jnp.moveaxis(queries.reshape(batch, num_heads, -1, block, dim), 2, 0)
    row = jnp.arange(length + spare).reshape(-1, block)
    column = jnp.arange(length)

    def of_block(total: Array, args: tuple[Array, Array]) -> tuple[Array, Array]:
        x, row = args
        logits = jnp.einsum("bhqd,bhkd->bhqk", x, keys)
        sees = jnp.broadcast_to(column[None, :] <= row[:, None], logits.shape)
        # A logit that is not finite is left out and does not influence the others.
        weight = softmax(logits, sees & jnp.isfinite(logits)).mean(axis=1)
        weight = jnp.where((row < length)[None, :, None], weight, 0.0)
        # The entries 0, 1, ... left of the diagonal.
        at = row[:, None] - jnp.arange(2 * window - 1)[None, :]
        at = jnp.broadcast_to(jnp.clip(at, 0, length - 1), (batch, *at.shape))
        return total + weight.sum(axis=1), jnp.take_along_axis(weight, at, axis=2)

    start = vary(jnp.zeros((batch, length)), queries, keys)
    total, band = jax.lax.scan(of_block, start, (queries, row))
    band = jnp.moveaxis(band, 0, 1).reshape(batch, -1, 2 * window - 1)
    # The weights that rows j, j + 1, ... give to key j: [batch, length, steps].
    steps = [jnp.roll(band[:, :, t], -t, axis=1) for t in range(2 * window - 1)]
    gone = jnp.cumsum(jnp.stack(steps, axis=-1), axis=-1)[:, :length]
    zero = jnp.zeros((batch, length, 1))
    below = jnp.maximum(total[:, :, None] - jnp.concatenate([zero, gone], axis=-1), 0.0)

    def windowed(steps: range) -> Array:
        # Key c + window - t is t rows above row c + window.
        parts = [jnp.roll(below[:, :, t], t - window, axis=1) for t in steps]
        return sum(parts[1:], start=parts[0])

    past, after = windowed(range(window, 2 * window)), windowed(range(window))
    top, low = jnp.maximum(past, after), jnp.minimum(past, after)
    valid = (column >= 2 * window - 1) & (column < length - 2 * window)
    ratio = (top + ROUNDING) / (low + ROUNDING)
    return jnp.where(jnp.broadcast_to(valid, ratio.shape), ratio, 0.0)
