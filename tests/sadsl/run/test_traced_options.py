"""Traced options of a call: a traced scale works, the others are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from sadsl.layers import attention_fn
from sadsl.selections import mass

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

NEAR = sa.causal() & sa.window(9)
CHOSEN = sa.causal() & mass(0.5, block=8, block_q=1, eligible=sa.causal())
SPECS = {
    "map": NEAR,
    "choice": CHOSEN,
    "cap": sa.softmax(NEAR, logits_soft_cap=2.0),
    "joint": sa.joint(sa.sinks(3) & sa.causal(), NEAR - sa.sinks(3)),
    "with linear": sa.average(NEAR, sa.linear()),
    "channel": sa.channel(),
}


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (2, 24, 4, 8), (2, 24, 4, 8), (2, 24, 4, 8)
    return [jnp.asarray(rng.normal(size=s), jnp.float32).astype(dtype) for s in shapes]


def run(q, k, v, spec, scale, impl, **options):
    interpret = impl in ("tpu", "triton")
    return sa.attention(
        q, k, v, spec, sm_scale=scale, impl=impl, interpret=interpret, **options
    )


def check(spec, impl, dtype="float32"):
    """Values and gradients by q, k and v are those of the number."""
    inputs = arrays(dtype)

    def both(scale, *inputs):
        out, pull = jax.vjp(lambda *x: run(*x, SPECS[spec], scale, impl), *inputs)
        return out, *pull(out)

    for a, b in zip(jax.jit(both)(0.7, *inputs), both(0.7, *inputs), strict=True):
        assert a.dtype == b.dtype
        oracle.assert_close(a, np.asarray(b, np.float64), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton", "reference"])
def test_a_traced_scale(impl):
    check("map", impl)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["choice", "with linear"])
def test_a_traced_scale_of_other_specs(spec):
    check(spec, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton", "reference"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_traced_scale_widely(spec, impl, dtype):
    check(spec, impl, dtype)


@pytest.mark.parametrize(
    "impl", ["xla", "reference", pytest.param("tpu", marks=pytest.mark.slow)]
)
def test_its_gradient(impl):
    q, k, v = arrays()

    def loss(scale, impl):
        return jnp.sum(jnp.sin(run(q, k, v, NEAR, scale, impl)))

    found = jax.jit(jax.grad(loss), static_argnums=1)(0.7, impl)
    step = 1e-2
    want = (loss(0.7 + step, "reference") - loss(0.7 - step, "reference")) / (2 * step)
    np.testing.assert_allclose(found, want, rtol=2e-3)


@pytest.mark.slow
def test_what_is_selected_with_a_traced_scale():
    q, k, _ = arrays()
    found = jax.jit(lambda scale: sa.select(CHOSEN, q, k, sm_scale=scale))(0.7)
    want = sa.select(CHOSEN, q, k, sm_scale=0.7)
    for name, x in want.items():
        np.testing.assert_array_equal(found[name], x)


def refused(error, match, **traced):
    q, k, v = arrays()
    key = jax.random.key(0) if "dropout_rate" in traced else None
    with pytest.raises(error, match=match):
        jax.jit(lambda given: sa.attention(q, k, v, NEAR, dropout_key=key, **given))(
            traced
        )


def test_what_is_refused():
    refused(TypeError, r"dropout_rate=.* is traced.*static argument", dropout_rate=0.1)
    refused(ValueError, r"sm_scale has shape \(4,\)", sm_scale=jnp.ones(4))


def test_batch_axes_of_a_drop_in():
    """(2, 3) beside (3, 2) are other entries; (2, 3) beside (2, 3) are the same."""
    attend = attention_fn(NEAR)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 9, 2, 4)), "float32") for _ in "qkv")
    out = attend(q, k, v)
    np.testing.assert_allclose(out[1], attend(q[1], k[1], v[1]), rtol=1e-5)
    turned = jnp.swapaxes(k, 0, 1)
    for name, given in {"key": (q, turned, v), "value": (q, k, turned)}.items():
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 2, 9.*the same"):
            attend(*given)
