"""Dense attention in float64 with gradients by autodiff: slow and plainly right."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The largest error against float64, relative to the largest value, by input dtype.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


class Result(NamedTuple):
    o: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def attention(q, k, v, pairs, sm_scale, soft_cap=None):
    """o, lse of ``[batch, heads, seq, dim]``; pairs are ``[b or 1, heads, q, k]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * sm_scale
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    row = pairs.any(axis=-1, keepdims=True)
    s = jnp.where(pairs, s, -jnp.inf)
    top = jnp.where(row, s.max(axis=-1, keepdims=True), 0.0)
    p = jnp.where(pairs, jnp.exp(jnp.where(pairs, s - top, 0.0)), 0.0)
    l = p.sum(axis=-1, keepdims=True)
    o = jnp.einsum("bhqk,bhkd->bhqd", p / jnp.where(row, l, 1.0), v)
    lse = jnp.where(row, top + jnp.log(jnp.where(row, l, 1.0)), -jnp.inf)
    return o, lse[..., 0]


def with_gradients(q, k, v, pairs, sm_scale, soft_cap=None, *, do, dlse=None):
    """Values and gradients for the cotangents ``do`` and ``dlse`` (None: zero)."""
    if dlse is None:
        dlse = np.zeros(np.shape(do)[:-1])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, do, dlse)]
        out = _with_gradients(*wide, jnp.asarray(pairs), sm_scale, soft_cap)
    return Result(*(np.asarray(x) for x in out))


@partial(jax.jit, static_argnums=(6, 7))
def _with_gradients(q, k, v, do, dlse, pairs, sm_scale, soft_cap):
    def loss(q, k, v):
        o, lse = attention(q, k, v, pairs, sm_scale, soft_cap)
        # A constant -inf carries no gradient.
        finite = jnp.where(pairs.any(axis=-1), lse, 0.0)
        return jnp.sum(o * do) + jnp.sum(finite * dlse), (o, lse)

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    (dq, dk, dv), (o, lse) = gradient(q, k, v)
    return o, lse, dq, dk, dv


def assert_close(actual, expected, dtype, what=""):
    """Asserts equality up to the tolerance of the input dtype; -inf is exact."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(
        np.where(finite, 0, actual), np.where(finite, 0, expected), err_msg=what
    )
    scale = max(1.0, float(np.abs(expected[finite]).max(initial=0.0)))
    error = np.abs(np.where(finite, actual - np.where(finite, expected, 0), 0))
    worst = float(error.max(initial=0.0)) / scale
    assert worst <= TOLERANCE[np.dtype(dtype).name], f"{what}: error {worst:.2e}"
