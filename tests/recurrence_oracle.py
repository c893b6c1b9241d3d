"""Linear recurrences by their definition: a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear import LinearOutputs, Recurrence, State
from pallas_kernels.linear.chunk import normalised


def recurrence(rule, inputs):
    """``linear.attend`` token by token, on arrays of any dtype."""
    q, k, v, erase, decay, starts, state = inputs
    batch, heads, _, seq, features = q.shape
    if decay is None:
        decay = jnp.zeros((1, 1, seq), q.dtype)
    decay = decay if decay.ndim == 4 else decay[..., None]
    decay = jnp.broadcast_to(decay, (batch, heads, seq, decay.shape[-1]))
    starts = jnp.zeros((1, seq), bool) if starts is None else starts
    starts = jnp.broadcast_to(starts[:, None], (batch, heads, seq))
    if state is None:
        s = jnp.zeros((batch, heads, features, v.shape[-1]), q.dtype)
        state = State(s, jnp.zeros((batch, heads, 1, features), q.dtype))
    z = jnp.zeros_like(k[:, :, :1]) if state.z is None else state.z

    def step(state, x):
        q, k, v, erase, decay, start = x
        state = jax.tree.map(lambda y: jnp.where(start[..., None, None], 0, y), state)
        (old, oldz), keep = state, jnp.exp(decay)
        s, z = keep[..., None] * old, keep[..., None, :] * oldz
        u = v
        if erase is not None:
            u = v - jnp.einsum("bhd,bhdv->bhv", erase, old if rule.erase_before else s)
        s, z = s + k[..., None] * u[..., None, :], z + k[..., None, :]
        read, readz = (old, oldz) if rule.read_before else (s, z)
        out = jnp.einsum("bhgd,bhdv->bhgv", q, read)
        total = jnp.einsum("bhgd,bhxd->bhgx", q, readz)
        if rule.eps is not None:
            out, total = normalised(out, total, rule.eps)
        return (s, z), (out, total[..., 0])

    def first(x, axis):
        return None if x is None else jnp.moveaxis(x, axis, 0)

    xs = first(q, 3), *(first(x, 2) for x in (k, v, erase, decay, starts))
    (s, z), (out, total) = jax.lax.scan(step, (state.s, z), xs)
    end = State(s, None if rule.eps is None else z)
    total = None if rule.eps is None else jnp.moveaxis(total, 0, 3)
    return LinearOutputs(jnp.moveaxis(out, 0, 3), total, end)


def exact(rule: Recurrence, inputs, cotangent):
    """Outputs and cotangents of ``inputs`` in float64, as NumPy arrays."""

    def double(x):
        x = np.asarray(x)
        return x if x.dtype == bool else x.astype(np.float64)

    with jax.enable_x64(True):
        inputs, cotangent = jax.tree.map(double, (inputs, cotangent))
        fixed = inputs._replace(starts=None)
        f = lambda x: recurrence(rule, x._replace(starts=inputs.starts))
        found, pull = jax.vjp(jax.jit(f), fixed)
        (grads,) = pull(jax.tree.map(jnp.asarray, cotangent))
        return jax.tree.map(np.asarray, (found, grads))
