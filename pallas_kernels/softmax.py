"""The arithmetic of one softmax tile, on values: shared by all backends.

The online softmax is that of Milakov and Gimelshein (Online normalizer calculation for
softmax, 2018), in the form of FlashAttention-2 (Dao, 2023, algorithm 1): the numerator
is divided once, after the last tile. The backward pass computes the weights again from
the lse (Dao, 2023, algorithm 2).

Exponentials have base 2, which chips compute. Scores are natural scores times a
``unit`` (``Call.unit``). It is log2(e), so that exponents need no factor. It is 1 if a
bias is added to the scores, since a finite bias times log2(e) can be infinite.

No finite number marks a masked pair, since a user can pass any finite number:

- The score of a masked pair becomes ``-inf``, whose weight is exactly 0.
- A running maximum starts at the least finite number, so that the NaN ``-inf - -inf``
  does not occur.
- Keys and values that no query of a tile sees become 0 before products, since ``0 *
  nan`` is NaN. If that would slow down every tile, a kernel first works without it. If
  the sums of a row are then not finite, it processes that row again (``careful``).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.precision import wide

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MASKED = -math.inf
# The lse of queries that see no key, in a backward pass: their weights are then 0.
ABSENT = math.inf
MODERATE = 2.0**56


class Carry(NamedTuple):
    """The running softmax of some rows: numerator, maximum of scores, denominator.

    With ``lanes > 1`` (TPU registers), ``m`` is the same in every lane, and the
    denominator is the sum of ``l`` over the lanes. This saves reductions and broadcasts
    across lanes in every tile.
    """

    acc: Any  # f32 [rows, head_dim_v]
    m: Any  # f32 [rows, lanes]
    l: Any  # f32 [rows, lanes]


def least(dtype: Any) -> float:
    """The least finite number, at which a running maximum starts."""
    return float(jnp.finfo(dtype).min)


def start(
    rows: int, head_dim_v: int, lanes: int = 1, dtype: Any = jnp.float32
) -> Carry:
    """The carry before the first tile."""
    return Carry(
        jnp.zeros((rows, head_dim_v), dtype),
        jnp.full((rows, lanes), least(dtype), dtype),
        jnp.zeros((rows, lanes), dtype),
    )


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """The product over axis ``contract[0]`` of ``a`` and ``contract[1]`` of ``b``.

    It is accumulated in f32 (f64 for f64) and multiplied in full precision, where the
    default of a chip is less.
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
    """``soft_cap * tanh(s / soft_cap)``; ``s`` is in ``unit``, ``soft_cap`` natural."""
    if soft_cap is None:
        return s
    limit = soft_cap * unit
    return limit * jnp.tanh(s * (1 / limit))


def cap_slope(
    capped: jax.Array, soft_cap: float | None, unit: float = LOG2_E
) -> jax.Array | float:
    """The derivative of ``cap``, from its value ``capped`` before masking."""
    if soft_cap is None:
        return 1.0
    return 1 - jnp.square(capped * (1 / (soft_cap * unit)))


def mask(s: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Sets scores to ``-inf`` where ``allowed`` is false; None allows all."""
    return s if allowed is None else jnp.where(allowed, s, MASKED)


def seen(s: jax.Array, axis: int) -> jax.Array:
    """Whether any masked score along ``axis`` is left; that axis then has size 1."""
    return s.max(axis=axis, keepdims=True) > MASKED


def all_finite(x: jax.Array) -> jax.Array:
    """Whether all elements are finite, by operations that every backend has."""
    return jnp.sum(x * 0.0) == 0.0


def all_moderate(x: jax.Array) -> jax.Array:
    """Whether no element is NaN, or so large that its products may not be finite.

    Sums of products with numbers below ``MODERATE`` are finite in f32.
    """
    # A comparison with NaN is false. A maximum of NaN may be another number on a chip.
    return jnp.sum(jnp.where(jnp.abs(x) < MODERATE, 0.0, 1.0)) == 0.0


def power(x: jax.Array, unit: float) -> jax.Array:
    """The exponential of a difference of scores in ``unit``."""
    return jnp.exp2(x if unit == LOG2_E else x * (LOG2_E / unit))


def _across(x: jax.Array, width: int) -> jax.Array:
    """``[rows, lanes]``, the same in every lane, as ``[rows, width]``."""
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
    real: jax.Array | None = None,
) -> Carry:
    """Adds a tile of masked scores ``[rows, keys]`` and values ``v`` to the softmax.

    ``v`` is ``[keys, head_dim_v]``. The dropout ``factor`` multiplies the weights of
    the values, but not the denominator. ``real`` is 0 for a column that repeats another
    one and does not count, and 1 for the others.
    """
    acc, m, l = carry
    m_new = jnp.maximum(m, s.max(axis=1, keepdims=True))
    p, fade = power(s - _across(m_new, s.shape[1]), unit), power(m - m_new, unit)
    p = p if real is None else p * real
    kept = p if factor is None else p * factor
    pv = dot(kept.astype(v.dtype), v, contract=(1, 0))
    acc = acc * _across(fade, acc.shape[1]) + pv
    return Carry(acc, m_new, l * fade + _lane_sums(p, l.shape[1]))


class Finished(NamedTuple):
    """The softmax of some rows. An empty row has output 0, lse -inf and total 1."""

    o: jax.Array  # f32 [rows, head_dim_v]
    lse: jax.Array  # [rows, 1]
    # The sum of the weights exp(s - lse), which is 1 up to the rounding of the lse.
    total: jax.Array  # [rows, 1]


def finish(carry: Carry, unit: float = LOG2_E) -> Finished:
    """Divides the numerator and computes the lse, after the last tile."""
    acc, m, l = carry
    if l.shape[-1] > 1:
        m, l = m[..., :1], l.sum(axis=-1, keepdims=True)
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    lse = jnp.where(empty, -jnp.inf, m * (1 / unit) + jnp.log2(safe) * LN_2)
    back = jnp.where(empty, m, lse * unit)
    return Finished(acc / safe, lse, safe * power(m - back, unit))


def lse_for_backward(lse: jax.Array, unit: float = LOG2_E) -> jax.Array:
    """The natural ``lse`` in ``unit``, with ``ABSENT`` for queries that see no key."""
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
    """The weights of a tile and the gradient of its natural scores, like ``s``.

    ``p = exp(s - lse)``, and ``ds = p * (dp * factor - delta) * slope``.

    Args:
      s: Masked scores in ``unit``, ``[q, k]`` or ``[k, q]``.
      lse: From ``lse_for_backward``; it broadcasts against ``s``.
      dp: ``do v^T``, like ``s``.
      delta: ``rowsum(do * o) - dlse``; it broadcasts against ``s``.
      factor: The dropout factor, like ``s``. The returned weights are ``p * factor``.
      slope: 1 for the gradient of what is added to capped scores; ``cap_slope`` for
        the gradient of the scores before the cap.
      unit: The unit of ``s`` and ``lse``.
      careful: Sets the gradient to 0 where ``p == 0``, also if ``dp`` is not finite.
    """
    p = power(s - lse, unit)
    dropped = p if factor is None else p * factor
    ds = p * ((dp if factor is None else dp * factor) - delta) * slope
    return dropped, jnp.where(p == 0, 0.0, ds) if careful else ds
