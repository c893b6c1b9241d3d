"""``local_linear`` against one ridge regression a query, in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import local_linear_oracle
import numpy as np
import pytest
import strategies
from hypothesis import strategies as st

import sadsl as sa

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")
SMALL = sa.KernelConfig(block_q=8, block_kv=8)


def arrays(q_len, kv_len=None, heads=4, kv_heads=2, dim=8, dim_v=5, seed=0):
    rng = np.random.default_rng(seed)
    kv_len = kv_len or q_len
    shapes = (
        (2, q_len, heads, dim),
        (2, kv_len, kv_heads, dim),
        (2, kv_len, kv_heads, dim_v),
    )
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_two_ways_to_the_definition_agree():
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in arrays(13))
    args = q[3], k, v, 0.1, 0.3
    np.testing.assert_allclose(
        local_linear_oracle.of_query(*args),
        local_linear_oracle.by_least_squares(*args), rtol=1e-10,
    )  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize(
    ("text", "q_len", "kv_len"),
    [
        ("causal()", 37, None),
        ("full()", 1, 130),
        ("causal() & window(5) - queries(9, 13)", 37, None),
        ("per_head(causal(), window(3, 2))", 13, 37),
        ("causal() & strided(4)", 130, None),
    ],
)
def test_is_a_regression_for_each_query(text, q_len, kv_len, impl):
    inputs = arrays(q_len, kv_len)
    ridge = np.array([0.05, 0.1, 0.3, 1.0])
    given = {"ridge": jnp.asarray(ridge, jnp.float32)}
    spec = sa.local_linear(sa.parse(text), "ridge")
    found = sa.attention(*inputs, spec, impl=impl, operands=given, config=SMALL)
    pairs = spec.map.dense(q_len, kv_len or q_len, num_heads=4)[None]
    wanted = local_linear_oracle.attention(*inputs, pairs, ridge, 8**-0.5)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
@hypothesis.settings(max_examples=25)
@hypothesis.given(strategies.composed(), st.integers(1, 40), st.integers(1, 40))
def test_random_maps(map_, q_len, kv_len):
    inputs = arrays(q_len, kv_len, heads=1, kv_heads=1, dim=3)
    found = sa.attention(*inputs, sa.local_linear(map_, 0.1), config=SMALL)
    pairs = map_.dense(q_len, kv_len)[None]
    wanted = local_linear_oracle.attention(*inputs, pairs, [0.1], 3**-0.5)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


# --- what the mathematics says ---


@jax.jit
def by_ridge(q, k, v, ridge):
    """One program for every ridge, the same for all heads."""
    given = {"ridge": jnp.full(q.shape[2], ridge, jnp.float32)}
    spec = sa.local_linear(sa.causal() - sa.queries(5, 6), "ridge")
    return sa.attention(q, k, v, spec, operands=given)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_weights_add_up_to_one(ridge):
    q, k, v = arrays(13)
    found = by_ridge(q, k, jnp.ones_like(v), ridge)
    wanted = np.ones(found.shape)
    wanted[:, 5] = 0
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_large_ridge_means_softmax():
    inputs = arrays(13)
    wanted = sa.attention(*inputs, sa.causal() - sa.queries(5, 6), impl="reference")
    np.testing.assert_allclose(by_ridge(*inputs, 1e6), wanted, atol=1e-5)


@pytest.mark.slow
def test_weights_may_be_negative():
    q, k, _ = arrays(13)
    weights = sa.induced(q, k, sa.local_linear(sa.causal(), 0.01), impl="xla")
    assert float(weights.min()) < -0.1


@pytest.mark.slow
def test_affine_values_come_out_exactly():
    """From head_dim + 1 keys on, which determine the plane."""
    with jax.enable_x64(True):
        q, k, _ = (x.astype(jnp.float64) for x in arrays(13, heads=2, dim=4))
        plane = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
        line = lambda x: x @ plane + 1.5
        spec = sa.local_linear(sa.causal(), 1e-9)
        found = sa.attention(q, k, line(k), spec)
        np.testing.assert_allclose(found[:, 4:], line(q)[:, 4:], atol=1e-4)


# --- as a value ---


def test_text():
    for text in (
        "local_linear(causal() & window(4), 0.5)",
        "local_linear(topk(3, block=8), 'ridge', tolerance=0.01, iterations=8)",
    ):
        spec = sa.parse(text)
        assert sa.parse(repr(spec)) == spec
    assert spec.operands == {"ridge": 1}
    assert sa.properties(sa.parse("local_linear(causal(), 1.0)"), 8).causal


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: sa.local_linear(sa.causal(), 0), ValueError, "ridge=0.0 must be posi"),
        (lambda: sa.local_linear(sa.causal(), -1), ValueError, "for the plain softmax"),
        (lambda: sa.local_linear(sa.causal(), float("inf")), ValueError, "and finite"),
        (lambda: sa.local_linear(sa.causal(), "a b"), ValueError, "identifier"),
        (lambda: sa.local_linear(sa.linear(), 1), TypeError, "takes an index map"),
        (lambda: sa.local_linear(sa.full(), 1, 0), ValueError, "tolerance=0.0 must be"),
        (lambda: sa.local_linear(sa.full(), 1, 1), ValueError, "between 0 and 1"),
        (
            lambda: sa.local_linear(sa.full(), 1, iterations=0),
            ValueError,
            "iterations=0 must be at least 1",
        ),
        (
            lambda: sa.joint(sa.causal(), sa.local_linear(sa.full(), 1)),
            ValueError,
            "no single normaliser of positive weights that others could share",
        ),
    ],
)
def test_what_it_is_not_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.slow
def test_mixtures():
    inputs = arrays(13)
    soft, local = sa.causal() & sa.window(3), sa.local_linear(sa.causal(), 0.1)
    one, two = (sa.attention(*inputs, x) for x in (soft, local))
    gates = jax.random.uniform(jax.random.key(0), (2, 13, 4, 2))
    found = sa.attention(*inputs, sa.gated(soft, local), operands={"gates": gates})
    wanted = gates[..., :1] * one + gates[..., 1:] * two
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    found = sa.attention(*inputs, sa.average(soft, local))
    np.testing.assert_allclose(found, (one + two) / 2, atol=1e-5)
    found = sa.attention(*inputs, sa.heads((soft, 2), (local, 2)))
    np.testing.assert_allclose(found[:, :, :2], one[:, :, :2], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 2:], two[:, :, 2:], atol=1e-5)
