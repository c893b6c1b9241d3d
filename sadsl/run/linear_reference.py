"""Linear attention by its definition: over all pairs, or token by token."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.linear import LinearInputs, LinearOutputs, Recurrence, State
from pallas_kernels.linear.chunk import normalised
from pallas_kernels.linear.marks import clipped
from pallas_kernels.precision import wide
from pallas_kernels.varying import vary


def all_pairs(arrays: Any, static: Any) -> tuple[Array, Array | None]:
    """``sum_k w_qk v_k`` over the pairs of the map, with all weights in memory.

    The arguments are those of ``sadsl.run.linear.run``: without erase vectors, with
    decays by head.
    """
    q, k, v, _, log_decay, _, ids, _, _ = arrays
    dtype = wide(q.dtype)
    heads = max(x.shape[2] for x in (q, k, v))
    if log_decay is not None:
        heads = max(heads, log_decay.shape[1])
    q, k, v = (
        jnp.repeat(x.astype(dtype), heads // x.shape[2], axis=2) for x in (q, k, v)
    )
    rows = static.q_offset + jnp.arange(q.shape[1])[:, None]
    columns = jnp.arange(k.shape[1])[None, :]
    seen = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool)
    if static.kind.causal:
        seen &= (columns <= rows)[None, None]
    if ids is not None:
        seen &= (ids[0][:, :, None] == ids[1][:, None, :])[:, None]
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    if log_decay is not None:
        # One sum for every pair: a difference of two prefix sums would be less exact.
        decay = clipped(log_decay)
        after = (jnp.arange(decay.shape[2])[:, None] > columns)[None, None]
        steps = jnp.cumsum(jnp.where(after, decay[..., None], 0.0), axis=2)
        steps = steps[:, :, static.q_offset : static.q_offset + q.shape[1]]
        weights *= jnp.exp(jnp.repeat(steps, heads // steps.shape[1], axis=1))
    weights = jnp.where(seen, weights, 0.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
    eps = static.call.rule.eps
    if eps is None:
        return out, None
    total = jnp.swapaxes(weights.sum(axis=3), 1, 2)[..., None]
    out, total = normalised(out, total, eps)
    return out, total[..., 0]


def token_by_token(inputs: LinearInputs, rule: Recurrence) -> LinearOutputs:
    """The recurrence of ``pallas_kernels.linear`` as a loop over tokens."""
    dtype = wide(inputs.q.dtype)
    batch, heads, _, seq, features = inputs.q.shape
    decay = inputs.log_decay
    decay = jnp.zeros((1, heads, seq, 1)) if decay is None else decay
    decay = clipped(decay if decay.ndim == 4 else decay[..., None]).astype(dtype)
    decay = jnp.broadcast_to(decay, (batch, heads, seq, decay.shape[-1]))
    starts = inputs.starts
    starts = jnp.zeros((batch, seq), bool) if starts is None else starts
    starts = jnp.broadcast_to(starts, (batch, seq))
    state = inputs.state
    if state is None:
        s = jnp.zeros((batch, heads, features, inputs.v.shape[-1]), dtype)
        z = jnp.zeros((batch, heads, 1, features), dtype)
        state = State(s, None if rule.eps is None else z)

    def step(state: State, x: tuple) -> tuple[State, tuple]:
        q, k, v, erase, decay, start = x
        old = jax.tree.map(
            lambda y: jnp.where(start[:, None, None, None], 0.0, y), state
        )
        keep = jnp.exp(decay)
        now = State(
            keep[..., :, None] * old.s,
            None if old.z is None else keep[..., None, :] * old.z,
        )
        if erase is not None:
            seen = old.s if rule.erase_before else now.s
            v = v - jnp.einsum("bhd,bhde->bhe", erase, seen, precision="highest")
        now = State(
            now.s + k[..., :, None] * v[..., None, :],
            None if now.z is None else now.z + k[..., None, :],
        )
        read = old if rule.read_before else now
        out = jnp.einsum("bhgd,bhde->bhge", q, read.s, precision="highest")
        if rule.eps is None:
            return now, (out, None)
        total = jnp.einsum("bhgd,bhxd->bhgx", q, read.z, precision="highest")
        out, total = normalised(out, total, rule.eps)
        return now, (out, total[..., 0])

    def first(x: Array | None, axis: int) -> Array | None:
        return None if x is None else jnp.moveaxis(x.astype(dtype), axis, 0)

    arrays = (first(x, 2) for x in (inputs.k, inputs.v, inputs.erase, decay))
    xs = first(inputs.q, 3), *arrays, jnp.moveaxis(starts, 1, 0)
    start = vary(jax.tree.map(dtype, state), xs)
    state, (out, total) = jax.lax.scan(step, start, xs)
    total = None if total is None else jnp.moveaxis(total, 0, 3)
    return LinearOutputs(jnp.moveaxis(out, 0, 3), total, state)
