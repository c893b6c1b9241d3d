"""Arrays of sharded calls, and their comparison with calls on one device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """A spec, the length of a call, and functions of it that make the arrays."""

    spec: Any
    n: int = 61
    operands: Any = None
    options: Any = None


def rng(seed=0):
    return np.random.default_rng(seed)


def ids(n):
    found = np.sort(rng(7).integers(0, 5, size=(2, n)), axis=1).astype(np.int32)
    return {"q_segment_ids": found, "kv_segment_ids": found}


def floats(*shape):
    return rng(5).normal(size=shape).astype(np.float32)


def integers_of(n):
    return rng(6).integers(0, 3, size=(2, n)).astype(np.int32)


def arrays(n, heads=2, kv_heads=2, batch=2, dim=8):
    shapes = ((batch, n, h, dim) for h in (heads, kv_heads, kv_heads))
    return tuple(jnp.asarray(floats(*s) * (i + 1)) for i, s in enumerate(shapes))


def with_gradients(call, inputs):
    out, pull = jax.vjp(call, *inputs)
    return (out, *pull(jnp.cos(out)))


def compared(call, whole, inputs, atol=3e-5):
    found = jax.jit(lambda *x: with_gradients(call, x))(*inputs)
    wanted = jax.jit(lambda *x: with_gradients(whole, x))(*inputs)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=atol)
