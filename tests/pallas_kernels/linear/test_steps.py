"""Grid steps of several chunks on TPUs, against the scan over chunks of "xla"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear
from pallas_kernels.config import KernelConfig

DIM, DIM_V = 8, 6


@pytest.fixture(autouse=True)
def quick():
    """Compiles without optimisations: compiling takes longer than running once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def inputs_of(seq, has, group, heads):
    """``has`` lists decays by head "d" or channel "c", erase "e", starts "s"."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=(1, heads, *shape)), "float32")

    k = array(seq, DIM)
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    decay = starts = erase = None
    if "d" in has or "c" in has:
        decay = -jnp.exp(array(seq, *((DIM,) if "c" in has else ())) - 2)
        decay = decay.at[:, :, ::5].set(-40.0).at[:, :, 1::7].set(0.0)
    if "s" in has:
        starts = jnp.asarray(rng.random((1, seq)) < 0.1)
    if "e" in has:
        erase = k * jnp.asarray(rng.uniform(0, 2, size=(1, heads, seq, 1)), "float32")
    q, v = array(group, seq, DIM), array(seq, DIM_V)
    state = None
    if "0" in has:
        z = array(1, DIM) if "n" in has else None
        state = linear.State(array(DIM, DIM_V), z)
    if "n" in has:
        q, k = abs(q), abs(k)
        state = None if state is None else linear.State(state.s, abs(state.z))
    return linear.LinearInputs(q, k, v, erase, decay, starts, state)


def run(inputs, call, impl):
    """The outputs and the gradients of a weighted sum of them."""
    fixed = inputs._replace(starts=None)

    def loss(x):
        found = linear.attend(x._replace(starts=inputs.starts), call, impl=impl)
        # The cotangent differs from entry to entry, so that no gradient cancels.
        parts = [
            jnp.sum(jnp.sin(jnp.arange(x.size, dtype=x.dtype) + 1).reshape(x.shape) * x)
            for x in jax.tree.leaves(found)
        ]
        return sum(parts), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(fixed)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("has", "seq", "group", "span"),
    [
        ("d", 13, 1, 2),
        pytest.param("dsn0", 45, 2, 2, marks=slow),
        pytest.param("des0", 37, 2, 3, marks=slow),
        pytest.param("ce0", 50, 1, 2, marks=slow),
        pytest.param("ces", 13, 1, 4, marks=slow),
    ],
)
def test_several_chunks_a_grid_step(has, seq, group, span):
    inputs = inputs_of(seq, has, group, heads=1 if seq == 13 else 2)
    rule = linear.Recurrence(1e-10 if "n" in has else None)
    call = linear.LinearCall(rule, 8, True, span=span)
    wanted = run(inputs, linear.LinearCall(rule, 8), "xla")
    found = run(inputs, call, "tpu")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale)


def test_a_step_is_cut_into_chunks():
    rule, long = linear.Recurrence(), KernelConfig(block_kv=512)

    def call(config, **has):
        sizes = linear.LinearSizes(4096, 128, 128, **has)
        return linear.default_call(rule, "tpu", sizes, "bfloat16", config)

    assert (call(long).chunk, call(long).span) == (256, 2)
    for has in ({"erase": True}, {"by_channel": True}):
        assert (call(long, **has).chunk, call(long, **has).span) == (128, 4)
        default = call(KernelConfig(), **has)
        assert (default.chunk, default.span, default.step) == (128, 2, 256)
    # 128 does not divide it, so it is one chunk.
    odd = call(KernelConfig(block_kv=64), erase=True)
    assert (odd.chunk, odd.span) == (64, 1)
