"""The backward pass in plain JAX over all pairs: what second derivatives go through.

Memory is quadratic; first derivatives never come here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import softmax
from pallas_kernels.call import WORD, Call, Cotangents, Inputs, PairBits, Vectors


def allowed(
    vectors: Vectors, tests: Any, q_shape: tuple[int, ...], kv_seq_len: int, call: Call
) -> jax.Array:
    """The pairs of every head, bool ``[batch or 1, heads, q, kv]``.

    ``tests`` of the heads are those of every batch entry, one after the other, or of
    all: entries differ in their plans, never in what is tested.
    """
    _, num_heads, q_seq_len, _ = q_shape
    q_ids = jnp.arange(q_seq_len, dtype=jnp.int32)[None, :, None]
    k_ids = jnp.arange(kv_seq_len, dtype=jnp.int32)[None, None, :]
    held = [unpacked(x, q_seq_len) for x in vectors.bits]

    def of_head(head: int) -> jax.Array:
        def at(x: jax.Array) -> jax.Array:
            return x[:, min(head, x.shape[1] - 1)]

        q_vectors = tuple(at(x)[..., :, None] for x in vectors.q)
        kv_vectors = tuple(at(x)[..., None, :] for x in vectors.kv)
        test = jnp.asarray(tests, jnp.int32)[head]
        bits = tuple(at(x) for x in held)
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
    at = np.arange(q_seq_len)[:, None]
    if x.diagonal:
        at = at + (plane[-1] - plane) * x.block_kv
        plane = 0 * plane
    plane = plane // x.blocks_per_plane
    word = x.bit // WORD
    words = x.words[:, :, plane, word, at]
    mask = jax.lax.shift_left(jnp.ones_like(x.bit), x.bit & (WORD - 1))
    return (words & mask[None, None, None]) != 0


def backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, tests: Any, call: Call
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``dq, dk, dv`` as the backends compute them, differentiable once more."""
    dtypes = [x.dtype for x in inputs]
    q, k, v = (x.astype(jnp.float32) for x in inputs)
    lse, do, delta = (x.astype(jnp.float32) for x in cotangents)
    batch, num_q_heads, _, _ = q.shape
    _, num_kv_heads, kv_seq_len, _ = k.shape
    group = num_q_heads // num_kv_heads
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))

    pairs = allowed(vectors, tests, q.shape, kv_seq_len, call)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest")
    s = softmax.cap(s * (call.sm_scale * softmax.LOG2_E), call.logits_soft_cap)
    dp = jnp.einsum("bhqd,bhkd->bhqk", do, v, precision="highest")
    lse2 = softmax.lse_for_backward(lse)[..., None]
    p, ds = softmax.score_gradient(
        s, pairs, lse2, dp, delta[..., None], call.logits_soft_cap
    )
    ds = ds * call.sm_scale
    dq = jnp.einsum("bhqk,bhkd->bhqd", ds, k, precision="highest")
    dk = jnp.einsum("bhqk,bhqd->bhkd", ds, q, precision="highest")
    dv = jnp.einsum("bhqk,bhqd->bhkd", p, do, precision="highest")

    def per_kv_head(x: jax.Array) -> jax.Array:
        return x.reshape(batch, num_kv_heads, group, kv_seq_len, -1).sum(axis=2)

    gradients = dq, per_kv_head(dk), per_kv_head(dv)
    dq, dk, dv = (x.astype(t) for x, t in zip(gradients, dtypes, strict=True))
    return dq, dk, dv
