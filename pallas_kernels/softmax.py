"""Tile mathematics on values, shared by every backend: fold, merge, finish, backward.

Exponentials are base 2, as the chips have it, and scores are natural scores times a
``unit``: log2(e), so that no exponent needs a factor, or 1 where a bias is added to
them, since a finite bias times log2(e) can be infinite (``Call.unit``). The online
softmax is that of Milakov and Gimelshein (2018) and Dao et al. (FlashAttention, 2022,
algorithm 1); the backward pass is algorithm 4 of the latter.

Who is absent is never told by the size of a number that a user can pass. The score of
a masked pair is replaced by ``-inf``, whose weight is exactly 0, whatever the score
was; a running maximum starts at the least finite number, so that ``-inf - -inf``, a
NaN, does not occur. The keys and values that no query of a tile sees are replaced by
zeros before products, since ``0 * nan`` is NaN. Where that would slow every tile down,
a kernel does it only if the sums of a row are found not to be finite: it walks that row
once more, with care.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.precision import wide

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MASKED = -math.inf
# The lse, in a backward pass, of queries that see no key: their weights are 0.
ABSENT = math.inf


class Carry(NamedTuple):
    """The running softmax of some rows: numerator, maximum of scores, denominator.

    On a chip whose registers have lanes, ``m`` is the same in every lane and ``l`` the
    sum of them, so that no tile reduces or broadcasts across lanes more than it must.
    """

    acc: Any  # f32 [rows, head_dim_v]
    m: Any  # f32 [rows, lanes]
    l: Any  # f32 [rows, lanes]


def least(dtype: Any) -> float:
    """The least finite number: what a running maximum starts at."""
    return float(jnp.finfo(dtype).min)


def start(
    rows: int, head_dim_v: int, lanes: int = 1, dtype: Any = jnp.float32
) -> Carry:
    """Nothing folded yet."""
    return Carry(
        jnp.zeros((rows, head_dim_v), dtype),
        jnp.full((rows, lanes), least(dtype), dtype),
        jnp.zeros((rows, lanes), dtype),
    )


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """``a`` times ``b`` over one axis of each, accumulated in f32 (f64 of f64).

    Both are multiplied in full precision, where chips default to less.
    """
    exact = a.dtype.itemsize >= 4
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=wide(a.dtype),
    )


def cap(s: jax.Array, soft_cap: float | None, unit: float = LOG2_E) -> jax.Array:
    """``soft_cap * tanh(s / soft_cap)`` of scores in ``unit``; the cap is natural."""
    if soft_cap is None:
        return s
    limit = soft_cap * unit
    return limit * jnp.tanh(s * (1 / limit))


def cap_slope(
    capped: jax.Array, soft_cap: float | None, unit: float = LOG2_E
) -> jax.Array | float:
    """The derivative of ``cap`` in terms of its value (before masking)."""
    if soft_cap is None:
        return 1.0
    return 1 - jnp.square(capped * (1 / (soft_cap * unit)))


def mask(s: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Masks what is not allowed; ``None`` allows all."""
    return s if allowed is None else jnp.where(allowed, s, MASKED)


def seen(s: jax.Array, axis: int) -> jax.Array:
    """Which keys (or queries) are in a pair of a tile of masked scores."""
    return s.max(axis=axis, keepdims=True) > MASKED


def all_finite(x: jax.Array) -> jax.Array:
    """Whether no element is NaN or infinite, in terms that every backend has."""
    return jnp.sum(x * 0.0) == 0.0


def power(x: jax.Array, unit: float) -> jax.Array:
    """``e`` to the power of a difference of scores in ``unit``."""
    return jnp.exp2(x if unit == LOG2_E else x * (LOG2_E / unit))


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
    carry: Carry,
    s: jax.Array,
    v: jax.Array,
    factor: jax.Array | None = None,
    unit: float = LOG2_E,
) -> Carry:
    """Folds one tile of masked scores ``[rows, keys]`` into the softmax.

    With dropout, ``factor`` multiplies the weights of the values, not the denominator.
    """
    acc, m, l = carry
    m_new = jnp.maximum(m, s.max(axis=1, keepdims=True))
    p, fade = power(s - _across(m_new, s.shape[1]), unit), power(m - m_new, unit)
    kept = p if factor is None else p * factor
    pv = dot(kept.astype(v.dtype), v, contract=(1, 0))
    acc = acc * _across(fade, acc.shape[1]) + pv
    return Carry(acc, m_new, l * fade + _lane_sums(p, l.shape[1]))


class Finished(NamedTuple):
    """The softmax of some rows; an empty one has output 0, lse -inf and total 1."""

    o: jax.Array  # f32 [rows, head_dim_v]
    lse: jax.Array  # [rows, 1]
    # The sum of the weights exp(s - lse): 1 but for the rounding of the lse.
    total: jax.Array  # [rows, 1]


def finish(carry: Carry, unit: float = LOG2_E) -> Finished:
    """The outputs of a running softmax."""
    acc, m, l = carry
    if l.shape[-1] > 1:
        m, l = m[..., :1], l.sum(axis=-1, keepdims=True)
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    lse = jnp.where(empty, -jnp.inf, m * (1 / unit) + jnp.log2(safe) * LN_2)
    back = jnp.where(empty, m, lse * unit)
    return Finished(acc / safe, lse, safe * power(m - back, unit))


def lse_for_backward(lse: jax.Array, unit: float = LOG2_E) -> jax.Array:
    """The lse in ``unit``, and ``ABSENT`` for the queries that see no key."""
    return jnp.where(jnp.isneginf(lse), ABSENT, lse * unit)


def score_gradient(
    s: jax.Array,
    lse: jax.Array,
    dp: jax.Array,
    delta: jax.Array,
    *,
    factor: jax.Array | None = None,
    slope: jax.Array | float = 1.0,
    unit: float = LOG2_E,
    careful: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The weights and the gradient of the natural scores, of one tile.

    ``s`` are masked scores and ``lse`` that of ``lse_for_backward``, both in ``unit``,
    ``dp = do v^T``, ``delta = rowsum(do * o) - dlse``; ``lse`` and ``delta`` broadcast
    against ``s`` in either orientation. With dropout, ``factor`` multiplies the
    weights; so it does the first result. The gradient is that of what is added to
    capped scores; with ``cap_slope`` as the ``slope``, that of the scores themselves.
    With ``careful`` it is 0 where the weight before dropout is, whatever value and
    score are there.
    """
    p = power(s - lse, unit)
    dropped = p if factor is None else p * factor
    ds = p * ((dp if factor is None else dp * factor) - delta) * slope
    return dropped, jnp.where(p == 0, 0.0, ds) if careful else ds
