"""The forward and backward pass in plain JAX over all pairs, for higher derivatives.

Memory is quadratic in the length. First derivatives do not use this module.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dropout, pair_values, softmax
from pallas_kernels.call import (
    WORD,
    Call,
    Cotangents,
    Inputs,
    Outputs,
    PairBits,
    ScoreValues,
    Vectors,
)
from pallas_kernels.precision import wide, widened
from pallas_kernels.shared_values import in_keys, of_keys
from pallas_kernels.solve import Accuracy, by_factors, checked


def allowed(
    vectors: Vectors, tests: Any, q_shape: tuple[int, ...], kv_seq_len: int, call: Call
) -> jax.Array:
    """The allowed pairs of every head, bool ``[batch or 1, heads, q, kv]``.

    ``tests`` has the number of the test of each head, int32 ``[heads]`` or ``[batch *
    heads]``. Only the first ``heads`` are read: batch entries differ in their plans,
    not in their tests.
    """
    _, num_heads, q_seq_len, _ = q_shape
    q_ids = jnp.arange(q_seq_len, dtype=jnp.int32)[None, :, None]
    k_ids = jnp.arange(kv_seq_len, dtype=jnp.int32)[None, None, :]
    unpacked_bits = [unpacked(x, q_seq_len) for x in vectors.bits]

    def of_head(head: int) -> jax.Array:
        def at(x: jax.Array) -> jax.Array:
            return x[:, min(head, x.shape[1] - 1)]

        q_vectors = tuple(at(x)[..., :, None] for x in vectors.q)
        kv_vectors = tuple(at(x)[..., None, :] for x in vectors.kv)
        test = jnp.asarray(tests, jnp.int32)[head]
        bits = tuple(at(x) for x in unpacked_bits)
        pairs = call.predicate(test, q_ids, k_ids, q_vectors, kv_vectors, bits)
        lead = jnp.broadcast_shapes(pairs.shape[:-2], (1,))
        return jnp.broadcast_to(pairs, (*lead, q_seq_len, kv_seq_len))

    found = [of_head(h) for h in range(num_heads)]
    lead = max(x.shape[0] for x in found)
    return jnp.stack([jnp.broadcast_to(x, (lead, *x.shape[1:])) for x in found], axis=1)


def unpacked(x: PairBits, q_seq_len: int) -> jax.Array:
    """The bits of all pairs, bool ``[batch or 1, heads or 1, q, kv]``."""
    (kv_seq_len,) = np.shape(x.bit)
    plane = np.arange(kv_seq_len) // x.block_kv
    at = np.arange(q_seq_len)[:, None] // x.queries_per_word
    if x.diagonal:
        at = at + (plane[-1] - plane) * x.block_kv
        plane = 0 * plane
    plane = plane // x.blocks_per_plane
    word = x.bit // WORD
    words = x.words[:, :, plane, word, at]
    mask = jax.lax.shift_left(jnp.ones_like(x.bit), x.bit & (WORD - 1))
    return (words & mask[None, None, None]) != 0


def forward(inputs: Inputs, vectors: Vectors, tests: Any, call: Call) -> Outputs:
    """The outputs that the backends compute, differentiable to any order."""
    pairs = allowed(vectors, tests, inputs.q.shape, inputs.k.shape[2], call)
    pairs, added = _with_scores(pairs, vectors, call)
    dtype = wide(inputs.q.dtype)
    return of_pairs(inputs, pairs, call, added, _factor(vectors, call, dtype))


def of_pairs(
    inputs: Inputs,
    pairs: jax.Array,
    call: Any,
    added: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> Outputs:
    """The softmax over ``pairs``, bool ``[batch or 1, heads, q, kv]``.

    Args:
      inputs: the arrays of the call.
      pairs: the pairs that attend.
      call: its scale, soft cap and unit are read.
      added: what is added to the capped scores, like ``pairs``.
      factor: the dropout factor, likewise.
    """
    q, k, v = _present(_with_values(inputs, call), pairs)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest")
    s = softmax.cap(s * call.scale, call.logits_soft_cap, call.unit)
    s = softmax.mask(s if added is None else s + added, pairs)
    # A constant in both places: p and lse do not depend on the maximum.
    top = jax.lax.stop_gradient(
        jnp.maximum(s.max(axis=-1, keepdims=True), softmax.least(s.dtype))
    )
    p = softmax.power(s - top, call.unit)
    l = p.sum(axis=-1, keepdims=True)
    some = l != 0
    l = jnp.where(some, l, 1.0)
    p = p / l if factor is None else p / l * factor
    o = jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest")
    lse = jnp.where(some, top * (1 / call.unit) + jnp.log(l), -jnp.inf)
    return Outputs(o.astype(inputs.q.dtype), lse[..., 0])


class _Rows(NamedTuple):
    """The arrays of a backward pass over all pairs; keys repeated per query head."""

    inputs: Inputs
    do: jax.Array  # [batch, q_heads, q, head_dim_v]
    p: jax.Array  # [batch, q_heads, q, kv]: weights, with dropout
    dadded: jax.Array  # like p: the gradient of what is added to the capped scores
    ds: jax.Array  # like p: the gradient of the scores before the cap


def _rows(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, tests: Any, call: Call
) -> _Rows:
    lse, do, delta = (widened(x)[..., None] for x in cotangents)
    do = jnp.where(jnp.isneginf(lse), 0.0, do[..., 0])
    pairs = allowed(vectors, tests, inputs.q.shape, inputs.k.shape[2], call)
    pairs, added = _with_scores(pairs, vectors, call)
    q, k, v = _present(_with_values(inputs, call), pairs)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest")
    s = softmax.cap(s * call.scale, call.logits_soft_cap, call.unit)
    dp = jnp.einsum("bhqd,bhkd->bhqk", do, v, precision="highest")
    total = softmax.mask(s if added is None else s + added, pairs)
    p, dadded = softmax.score_gradient(
        total, softmax.lse_for_backward(lse, call.unit), dp, delta,
        factor=_factor(vectors, call, s.dtype), unit=call.unit,
    )  # fmt: skip
    ds = dadded * softmax.cap_slope(s, call.logits_soft_cap, call.unit)
    return _Rows(Inputs(q, k, v), do, p, dadded, ds)


def backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, tests: Any, call: Call
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """``dq, dk, dv`` as the backends compute them, differentiable to any order."""
    batch, num_kv_heads, kv_seq_len, _ = inputs.k.shape
    (q, k, _), do, p, _, ds = _rows(inputs, cotangents, vectors, tests, call)
    ds = ds * call.sm_scale
    dq = jnp.einsum("bhqk,bhkd->bhqd", ds, k, precision="highest")
    dk = jnp.einsum("bhqk,bhqd->bhkd", ds, q, precision="highest")
    dv = jnp.einsum("bhqk,bhqd->bhkd", p, do, precision="highest")

    def per_kv_head(x: jax.Array) -> jax.Array:
        return x.reshape(batch, num_kv_heads, -1, kv_seq_len, x.shape[-1]).sum(axis=2)

    dk, dv = per_kv_head(dk), per_kv_head(dv)
    if call.values is not None:
        dk = dk + in_keys(dv, call.values, dk.shape[-1])
    dq, dk, dv = (x.astype(y.dtype) for x, y in zip((dq, dk, dv), inputs, strict=True))
    return dq, dk, dv if call.values is None else None


def score_backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, tests: Any, call: Call
) -> ScoreValues:
    """The gradient of ``vectors.scores``, differentiable to any order."""
    gradient = _rows(inputs, cotangents, vectors, tests, call).dadded

    def of(values: ScoreValues) -> jax.Array:
        found = on_all_pairs(values, gradient.shape[2:], call)
        return jnp.broadcast_to(found, gradient.shape)

    return jax.vjp(of, vectors.scores)[1](gradient)[0]


def local_linear(
    inputs: Inputs, at: jax.Array, ridge: jax.Array, pairs: jax.Array,
    sm_scale: Any, accuracy: Accuracy,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Output, lse and residual of local linear attention, with every ``C`` formed.

    ``xla/local_linear.py`` has the formulas and the shapes. ``pairs`` are as
    ``allowed`` returns them.
    """
    q, k, v = _present(inputs, pairs)
    some = pairs.any(axis=-1, keepdims=True)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") * sm_scale
    least = softmax.least(s.dtype)
    top = jnp.max(s, axis=-1, keepdims=True, where=pairs, initial=least)
    top = jax.lax.stop_gradient(top)
    p = jnp.where(pairs, jnp.exp(jnp.where(pairs, s - top, 0.0)), 0.0)
    l = jnp.where(some, p.sum(axis=-1, keepdims=True), 1.0)
    p, lse = p / l, jnp.where(some, top + jnp.log(l), -jnp.inf)
    # A common offset of the keys changes no result, but it adds rounding to C.
    centre = jax.lax.stop_gradient(k.mean(axis=2, keepdims=True))
    k, size = k - centre, k.shape[-1]
    mean = jnp.einsum("bhqk,bhkd->bhqd", p, k, precision="highest")
    squares = (k[..., :, None] * k[..., None, :]).reshape(*k.shape[:-1], -1)
    moments = jnp.einsum("bhqk,bhkc->bhqc", p, squares, precision="highest")
    of_mean = mean[..., :, None] * mean[..., None, :]
    one = jnp.eye(size, dtype=k.dtype)[None, None, None]
    a = moments.reshape(of_mean.shape) - of_mean + ridge[..., None, None] * one
    b = jnp.where(some, at - centre - mean, 0.0)
    x = by_factors(a, b)
    left = b - jnp.einsum("bhqde,bhqe->bhqd", a, x, precision="highest")
    x, residual = checked(x, left, b, accuracy)
    along = jnp.einsum("bhqd,bhkd->bhqk", x, k, precision="highest")
    weights = p * (1 + along - jnp.sum(mean * x, axis=-1, keepdims=True))
    o = jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision="highest")
    return jnp.where(some, o, 0.0), lse[..., 0], residual[..., 0]


def on_all_pairs(
    values: ScoreValues, lengths: tuple[int, ...], call: Call
) -> jax.Array:
    """The values added to the scores, f32 ``[batch or 1, heads or 1, q, kv]``."""
    assert call.scores is not None
    q_seq_len, kv_seq_len = lengths
    return call.scores(
        jnp.arange(q_seq_len, dtype=jnp.int32)[None, None, :, None],
        jnp.arange(kv_seq_len, dtype=jnp.int32)[None, None, None, :],
        tuple(x[..., :, None] for x in values.q),
        tuple(x[..., None, :] for x in values.kv),
        tuple(pair_values.of_all(x, q_seq_len, kv_seq_len) for x in values.pairs),
    )


def _with_values(inputs: Inputs, call: Any) -> Inputs:
    """The inputs, with values from the keys if ``call.values`` says so."""
    if call.values is None:
        return inputs
    return inputs._replace(v=of_keys(inputs.k, call.values))


def _present(inputs: Inputs, pairs: jax.Array) -> Inputs:
    """The inputs in f32, keys repeated per query head, and 0 for rows in no pair."""
    q, k, v = map(widened, inputs)
    group = q.shape[1] // k.shape[1]
    sees, seen = pairs.any(axis=-1)[..., None], pairs.any(axis=-2)[..., None]
    k, v = (jnp.where(seen, jnp.repeat(x, group, axis=1), 0.0) for x in (k, v))
    return Inputs(jnp.where(sees, q, 0.0), k, v)


def _with_scores(
    pairs: jax.Array, vectors: Vectors, call: Call
) -> tuple[jax.Array, jax.Array | None]:
    """The pairs without those to which ``-inf`` is added, and the added values."""
    if call.scores is None:
        return pairs, None
    found = on_all_pairs(vectors.scores, pairs.shape[2:], call)
    out = jnp.isneginf(found)
    return pairs & ~out, jnp.where(out, 0.0, found)


def _factor(vectors: Vectors, call: Call, dtype: Any) -> jax.Array | None:
    """The dropout factor of every weight; None without dropout."""
    if not call.dropout_rate:
        return None
    assert vectors.seeds is not None
    queries, keys = vectors.seeds.q[..., :, None], vectors.seeds.kv[..., None, :]
    return dropout.factor(queries, keys, call.dropout_rate, dtype)
