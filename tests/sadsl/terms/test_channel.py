"""Channel attention against loops over channels, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from sadsl import catalog

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def quick():
    """What is at stake is what is computed, not how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def arrays(length, heads=2, kv_heads=1, dim=6, dtype=jnp.float32):
    shapes = (heads, kv_heads, kv_heads, heads)
    keys = jax.random.split(jax.random.key(length), 4)
    return [
        jax.random.normal(key, (2, length, h, dim)).astype(dtype)
        for key, h in zip(keys, shapes, strict=True)
    ]


def wide(*arrays):
    return [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]


@partial(jax.jit, static_argnums=3)
def by_heads(q, k, v, scale):
    """Each channel of the output is a mean of the channels of ``v``, head by head."""
    group = q.shape[2] // k.shape[2]
    heads = []
    for h in range(q.shape[2]):
        mine = (x[:, :, i] for x, i in ((q, h), (k, h // group), (v, h // group)))
        q_, k_, v_ = (jnp.swapaxes(x, 1, 2) for x in mine)
        weights = jnp.exp(q_ @ jnp.swapaxes(k_, 1, 2) * scale)
        weights = weights / weights.sum(axis=2, keepdims=True)
        heads.append(jnp.swapaxes(weights @ v_, 1, 2))
    return jnp.stack(heads, axis=2)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("length", "dtype", "spec"),
    [
        (1, jnp.float32, "channel()"),
        (130, jnp.float32, "channel('tokens')"),
        (13, jnp.bfloat16, "channel()"),
    ],
)
def test_is_softmax_attention_between_channels(length, dtype, spec):
    q, k, v, do = arrays(length, dtype=dtype)
    scale = length**-0.5 if "tokens" in spec else 6**-0.5

    @jax.jit
    def found(q, k, v):
        out, pull = jax.vjp(lambda *x: sa.attention(*x, spec), q, k, v)
        return out, *pull(do)

    with jax.enable_x64(True):
        out, pull = jax.vjp(lambda *x: by_heads(*x, scale), *wide(q, k, v))
        wanted = [np.asarray(x) for x in (out, *pull(*wide(do)))]
    for a, b in zip(found(q, k, v), wanted, strict=True):
        assert a.dtype == dtype
        oracle.assert_close(a, b, dtype)


def test_reference_takes_float64_and_a_scale():
    with jax.enable_x64(True):
        q, k, v = wide(*arrays(5)[:3])
        found = sa.attention(q, k, v, sa.channel(), sm_scale=0.3, impl="reference")
        np.testing.assert_allclose(found, by_heads(q, k, v, 0.3), rtol=1e-12)


def test_dual_attention_in_turns():
    """Blocks of windows and of channels, as the paper stacks them."""
    q, k, v, _ = arrays(24)
    near = catalog.davit_window(4, 6, 2)
    x = sa.attention(q, k, v, near, impl="reference")
    found = sa.attention(x, k, v, catalog.davit_channel())
    np.testing.assert_allclose(found, by_heads(x, k, v, 6**-0.5), atol=2e-5)
    assert catalog.davit_channel(florence=True) == sa.channel("tokens")


def test_text():
    for spec in (sa.channel(), sa.channel("tokens")):
        assert sa.parse(repr(spec)) == spec


def test_what_it_cannot_do_is_refused():
    q, k, v, _ = arrays(13)
    with pytest.raises(ValueError, match=r"scale='n' must be 'head_dim' or 'tokens'"):
        sa.channel("n")
    with pytest.raises(ValueError, match=r"channel\(\) with 3 queries and 13 keys"):
        sa.attention(q[:, :3], k, v, sa.channel())
    with pytest.raises(ValueError, match=r"head_dim 6 and head_dim_v 4"):
        sa.attention(q, k, v[..., :4], sa.channel())
    with pytest.raises(NotImplementedError, match=r"q_offset=2.*leave both 0"):
        sa.attention(q, k, v, sa.channel(), q_offset=2)
    key = jax.random.key(0)
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0.1: its weights"):
        sa.attention(q, k, v, sa.channel(), dropout_rate=0.1, dropout_key=key)
    with pytest.raises(NotImplementedError, match=r"return_lse"):
        sa.attention(q, k, v, sa.channel(), return_lse=True)
    with pytest.raises(ValueError, match=r"joint: channel\(\) has no single"):
        sa.joint(sa.causal(), sa.channel())
