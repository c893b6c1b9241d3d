"""Runs the public call on every backend and compares it with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import sadsl as sa

SMALL = sa.KernelConfig(block_q=32, block_kv=32)
BACKENDS = {
    "reference": {},
    "xla": {},
    "tpu": {"interpret": True, "config": SMALL},
    "triton": {"interpret": True, "config": SMALL},
}
IMPLS = tuple(BACKENDS)


def arrays(batch=2, q_len=70, kv_len=70, heads=4, kv_heads=2, dim=16, dim_v=16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, q_len, heads, dim),
        (batch, kv_len, kv_heads, dim),
        (batch, kv_len, kv_heads, dim_v),
        (batch, q_len, heads, dim_v),
    ]
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def assert_matches(impl, spec, pairs, q, k, v, do, *, soft_cap=None, **options):
    """Compares values, lse and gradients with the float64 oracle on ``pairs``."""
    rng = np.random.default_rng(9)
    dlse = jnp.asarray(
        rng.normal(size=(*q.shape[:1], q.shape[2], q.shape[1])), "float32"
    )
    options |= BACKENDS[impl] | {"impl": impl, "return_lse": True}

    def call(q, k, v):
        return sa.attention(q, k, v, spec, **options)

    (o, lse), pull = jax.vjp(call, q, k, v)
    dq, dk, dv = pull((do, dlse))
    swap = lambda x: np.swapaxes(np.asarray(x), 1, 2)
    expected = oracle.with_gradients(
        swap(q), swap(k), swap(v), pairs, q.shape[-1] ** -0.5, soft_cap,
        do=swap(do), dlse=dlse,
    )  # fmt: skip
    found = oracle.Result(swap(o), lse, swap(dq), swap(dk), swap(dv))
    for name, a, b in zip(found._fields, found, expected, strict=True):
        oracle.assert_close(a, b, "float32", f"{impl} {spec!r} {name}")
