"""Tile mathematics on values, shared by every backend: fold, merge, finish, backward.

Exponentials are base 2, as the chips have it: ``q`` comes scaled by
``sm_scale * log2(e)``, so a score ``s`` here stands for the natural score times
``log2(e)``. The online softmax is that of Milakov and Gimelshein (2018) and Dao et al.
(FlashAttention, 2022, algorithm 1); the backward pass is algorithm 4 of the latter.

A masked score is the finite ``MASKED``, and a running maximum starts at the finite
``FLOOR`` above it: a row that selects no key then keeps ``l == 0`` with no NaN on the
way (``-inf - -inf`` would be one).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MASKED = -1e30
FLOOR = -0.5e30
# The lse of queries that are not there: whatever is added to their scores, p is 0.
BEYOND = 1e30


class Carry(NamedTuple):
    """The running softmax of some rows: numerator, maximum (base 2), denominator.

    On a chip whose registers have lanes, ``m`` is the same in every lane and ``l`` the
    sum of them, so that no tile reduces or broadcasts across lanes more than it must.
    """

    acc: Any  # f32 [rows, head_dim_v]
    m: Any  # f32 [rows, lanes]
    l: Any  # f32 [rows, lanes]


def start(rows: int, head_dim_v: int, lanes: int = 1) -> Carry:
    """Nothing folded yet."""
    return Carry(
        jnp.zeros((rows, head_dim_v), jnp.float32),
        jnp.full((rows, lanes), FLOOR, jnp.float32),
        jnp.zeros((rows, lanes), jnp.float32),
    )


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """``a`` times ``b`` over one axis of each, accumulated in f32.

    f32 operands are multiplied in full precision: chips default to less.
    """
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def cap(s: jax.Array, soft_cap: float | None) -> jax.Array:
    """``soft_cap * tanh(s / soft_cap)`` of base-2 scores; ``soft_cap`` is natural."""
    if soft_cap is None:
        return s
    limit = soft_cap * LOG2_E
    return limit * jnp.tanh(s * (1 / limit))


def cap_slope(capped: jax.Array, soft_cap: float | None) -> jax.Array | float:
    """The derivative of ``cap`` in terms of its value (before masking)."""
    if soft_cap is None:
        return 1.0
    return 1 - jnp.square(capped * (1 / (soft_cap * LOG2_E)))


def mask(s: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Masks what is not allowed; ``None`` allows all."""
    return s if allowed is None else jnp.where(allowed, s, MASKED)


def _across(x: jax.Array, width: int) -> jax.Array:
    """What is the same in every lane, for ``width`` columns."""
    lanes = x.shape[1]
    if lanes == 1:
        return x
    return jnp.concatenate([x] * -(-width // lanes), axis=1)[:, :width]


def _lane_sums(p: jax.Array, lanes: int) -> jax.Array:
    if lanes == 1:
        return p.sum(axis=1, keepdims=True)
    total = p[:, :lanes]
    for i in range(lanes, p.shape[1], lanes):
        total += p[:, i : i + lanes]
    return total


def fold(
    carry: Carry, s: jax.Array, v: jax.Array, factor: jax.Array | None = None
) -> Carry:
    """Folds one tile of masked base-2 scores ``[rows, keys]`` into the softmax.

    With dropout, ``factor`` multiplies the weights of the values, not the denominator.
    """
    acc, m, l = carry
    m_new = jnp.maximum(m, s.max(axis=1, keepdims=True))
    p, fade = jnp.exp2(s - _across(m_new, s.shape[1])), jnp.exp2(m - m_new)
    kept = p if factor is None else p * factor
    pv = dot(kept.astype(v.dtype), v, contract=(1, 0))
    acc = acc * _across(fade, acc.shape[1]) + pv
    return Carry(acc, m_new, l * fade + _lane_sums(p, l.shape[1]))


def finish(carry: Carry) -> tuple[jax.Array, jax.Array]:
    """Output f32 ``[rows, head_dim_v]``, lse ``[rows, 1]``; 0 and -inf if empty."""
    acc, m, l = carry
    if l.shape[-1] > 1:
        m, l = m[..., :1], l.sum(axis=-1, keepdims=True)
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    lse = jnp.where(empty, -jnp.inf, (m + jnp.log2(safe)) * LN_2)
    return acc / safe, lse


def lse_for_backward(lse: jax.Array) -> jax.Array:
    """Base-2 lse with 0 for empty rows, so that masked scores still give ``p == 0``."""
    return jnp.where(jnp.isneginf(lse), 0.0, lse * LOG2_E)


def score_gradient(
    s: jax.Array,
    allowed: jax.Array | None,
    lse2: jax.Array,
    dp: jax.Array,
    delta: jax.Array,
    soft_cap: float | None,
    added: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``p`` and the gradient of the uncapped natural scores, of one tile.

    ``s`` is capped and unmasked (base 2), ``added`` is what comes on top of it, ``dp =
    do v^T``, ``delta = rowsum(do * o) - dlse``; ``lse2`` and ``delta`` broadcast
    against ``s`` in either orientation. With dropout, ``factor`` multiplies the
    weights; so it does the first result.
    """
    total = s if added is None else s + added
    p = jnp.exp2(mask(total, allowed) - lse2)
    if factor is None:
        return p, p * (dp - delta) * cap_slope(s, soft_cap)
    return p * factor, p * (dp * factor - delta) * cap_slope(s, soft_cap)
