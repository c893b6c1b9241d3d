"""``softmax(scale=, values=)`` against the same call with q and v made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa

SCALE = sa.bias(lambda q, k, h: sa.weights("t")[h] * sa.log(q + 1) + 0.5)


def arrays(n=13, m=30):
    rng = np.random.default_rng(0)
    shapes = (2, n, 4, 8), (2, m, 2, 8), (4,)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def test_factors_count_positions_and_have_gradients():
    q, k, t = arrays()
    spec = sa.softmax(sa.causal(), scale=SCALE)

    def found(q, t):
        return sa.attention(q, k, k, spec, operands={"t": t}, q_offset=17)

    def wanted(q, t):
        at = jnp.log(jnp.arange(17, 30, dtype=jnp.float32) + 1)
        factor = at[:, None] * t[None] + 0.5
        return sa.attention(q * factor[None, ..., None], k, k, sa.causal(), q_offset=17)

    for run in (found, wanted):
        assert run(q, t).shape == (2, 13, 4, 8)
    np.testing.assert_allclose(found(q, t), wanted(q, t), atol=2e-6)
    both = [
        jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1))(q, t) for f in (found, wanted)
    ]
    for x, y in zip(*both, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6)


def test_values_are_channels_of_keys():
    q, k, _ = arrays()
    spec = sa.softmax(sa.causal(), values=slice(2, 6))
    found = sa.attention(q, k, k, spec, q_offset=17)
    wanted = sa.attention(q, k, k[..., 2:6], sa.causal(), q_offset=17)
    np.testing.assert_array_equal(found, wanted)


def test_bad_factors_and_values_are_refused():
    q, k, _ = arrays()
    with pytest.raises(ValueError, match="reads the key"):
        sa.softmax(sa.causal(), scale=sa.alibi())
    with pytest.raises(ValueError, match="at least one channel"):
        sa.softmax(sa.causal(), values=slice(4, 4))
    with pytest.raises(TypeError, match="must be a slice"):
        sa.softmax(sa.causal(), values=slice(0, 8, 2))
    with pytest.raises(ValueError, match="pass k for v"):
        sa.attention(q, k, k, sa.softmax(sa.full(), values=slice(0, 9)))
    with pytest.raises(ValueError, match="'t' was not given"):
        sa.attention(q, k, k, sa.softmax(sa.full(), scale=SCALE))


@pytest.mark.parametrize("option", [{"scale": SCALE}, {"values": slice(0, 4)}])
def test_what_shows_the_kernel_alone_refuses_them(option):
    """They would be ignored: attention applies them before the kernel."""
    q, k, _ = arrays()
    spec = sa.softmax(sa.full(), **option)
    with pytest.raises(NotImplementedError, match=r"plan_for: .*before the kernel"):
        sa.plan_for(spec, q, k)
