"""Features and their cotangents are float32, whatever the dtype of q and k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sadsl as sa

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

slow = pytest.mark.slow
SEQ, DIM = 40, 4
IMPLS = ["xla", "tpu", "triton", "reference"]
RTOL = {"float16": 2e-3, "bfloat16": 3e-2}


def elu1(x):
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


# By name: the feature map of a call, its definition, where q and k lie.
MAPS = {
    "elu1": ("elu1", elu1, -10.0),
    "exp": (jnp.exp, jnp.exp, -12.0),
    "operand": ("phi", jnp.exp, -12.0),
    "relu": ("relu", lambda x: jnp.maximum(x, 0), 0.0),
    "identity": ("identity", lambda x: x, 1.0),
    # Features beyond the range of f16, and sums of more.
    "large": ("identity", lambda x: x, 3e2),
}


def arrays(at, dtype, spread=0.5):
    rng = np.random.default_rng(0)
    shapes = (1, SEQ, 2, DIM), (1, SEQ, 1, DIM), (1, SEQ, 1, DIM)
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    scaled = at + spread * max(1.0, abs(at) / 20) * q, at + spread * k, v
    return [jnp.asarray(x, jnp.float32).astype(dtype) for x in scaled]


def definition(phi, q, k, v):
    w = jnp.einsum("bqhd,bkgd->bhqk", phi(q), phi(k)) * np.tri(q.shape[1])[None, None]
    out = jnp.einsum("bhqk,bkgd->bqhd", w, v)
    return out / (jnp.swapaxes(w.sum(axis=3), 1, 2)[..., None] + 1e-10)


def expected(phi, inputs):
    """Values and gradients in float64, of the inputs as they are rounded."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        out, pull = jax.vjp(lambda *x: definition(phi, *x), *wide)
        return [np.asarray(x) for x in (out, *pull(jnp.cos(out)))]


def check(name, impl, dtype):
    feature_map, phi, at = MAPS[name]
    inputs = arrays(at, dtype)
    given = {"phi": phi} if feature_map == "phi" else None

    @jax.jit
    def run(*inputs):
        f = lambda q, k, v: sa.attention(
            q, k, v, sa.linear(feature_map), impl=impl, operands=given,
            interpret=impl in ("tpu", "triton"), config=sa.KernelConfig(block_kv=16),
        )  # fmt: skip
        out, pull = jax.vjp(f, *inputs)
        return out, *pull(jnp.cos(out.astype(jnp.float32)).astype(out.dtype))

    limit = float(jnp.finfo(dtype).max)
    for found, want in zip(run(*inputs), expected(phi, inputs), strict=True):
        assert found.dtype == dtype
        scale = np.abs(want).max()
        assert scale < limit
        error = np.abs(np.asarray(found, np.float64) - want).max()
        # Numbers below 6e-8 are 0 in float16.
        assert error <= RTOL[dtype] * 10 * scale + 1e-7, (name, error / scale)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_float16(impl):
    check("elu1", impl, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["operand"])
def test_float16_of_other_features(name):
    check(name, "xla", "float16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MAPS)
def test_every_feature_map(name, impl, dtype):
    # Gradients by large features are small differences: bfloat16 has no digits of them.
    check(name, impl, "float16" if name == "large" else dtype)


@pytest.mark.sample(1)
@pytest.mark.parametrize("map", [sa.causal(), sa.full(), sa.segments()], ids=str)
@pytest.mark.parametrize("at", [-18.0, -12.0])
def test_far_below_zero(map, at):
    """No row vanishes that has weight, and no gradient is infinite."""
    q, k, v = arrays(at, "float16", 0.3)
    ids = jnp.arange(SEQ)[None] // 15
    given = {"q_segment_ids": ids, "kv_segment_ids": ids} if "seg" in str(map) else {}

    def loss(q, k, v):
        out = sa.attention(q, k, v, sa.linear(map=map), **given)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, out = grad(q, k, v)
    assert (out != 0).any(axis=-1).all()
    assert all(np.isfinite(x).all() for x in grads)


def test_a_flax_module_gets_float32():
    """As any feature map does, and so do the gradients of its weights."""
    phi = nnx.Linear(DIM, 3, rngs=nnx.Rngs(0))
    seen = []

    def features(x):
        seen.append(x.dtype)
        return jnp.exp(phi(x) - 12)

    q, k, v = arrays(0.0, "float16")
    out = sa.attention(q, k, v, sa.linear("phi"), operands={"phi": features})
    assert seen == [jnp.float32, jnp.float32]
    assert out.dtype == jnp.float16
    assert (out != 0).any(axis=-1).all()


@pytest.mark.slow
def test_decoding_in_float16():
    q, k, v = arrays(-18.0, "float16", 0.3)
    term = sa.linear()
    whole = np.asarray(sa.attention(q, k, v, term), np.float32)
    state = sa.linear_prefill(term, k[:, :30], v[:, :30])
    for t in range(30, 33):
        state, out = sa.linear_step(term, state, q[:, t], k[:, t], v[:, t])
        assert out.any()
        np.testing.assert_allclose(out, whole[:, t], rtol=5e-3, atol=1e-7)
