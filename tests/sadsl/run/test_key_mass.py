"""``key_mass`` and ``indexer_loss`` against their definitions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.layers.indexer import divergence


def arrays(n=19, heads=4, kv_heads=2):
    rng = np.random.default_rng(0)
    shapes = (2, n, heads, 5), (2, n, kv_heads, 5)
    q, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    listed = np.sort(rng.integers(0, n, (2, kv_heads, n, 4)), axis=-1)
    listed[..., -1] = n
    return q, k, listed


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mass_of_listed_keys(groups):
    q, k, listed = arrays()
    listed = listed[:, [0, 1, 0, 1][:groups]]
    _, lse = sa.attention(q, k, k, sa.causal(), return_lse=True)
    found = sa.key_mass(q, k, lse, jnp.asarray(listed))
    qn, kn = np.asarray(q, np.float64), np.asarray(k, np.float64)
    s = np.einsum("bqhd,bkhd->bhqk", qn, np.repeat(kn, 2, axis=2)) * 5**-0.5
    p = np.exp(s - np.asarray(lse, np.float64)[..., None])
    p = np.concatenate([p, np.zeros_like(p[..., :1])], axis=-1)
    p = p.reshape(2, groups, -1, *p.shape[2:]).sum(2)
    wanted = np.take_along_axis(p, listed, axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    q, k, listed = arrays()
    _, lse = sa.attention(q, k, k, sa.causal(), return_lse=True)
    with pytest.raises(ValueError, match="lse has shape"):
        sa.key_mass(q, k, lse[:, :1], listed)
    with pytest.raises(ValueError, match="listed has shape"):
        sa.key_mass(q, k, lse, listed[:, :, :3])
    with pytest.raises(ValueError, match="3 groups of lists"):
        sa.key_mass(q, k, lse, np.repeat(listed[:, :1], 3, axis=1))


def test_divergence_ignores_what_has_no_weight():
    target = jnp.array([[[[0.0, 0.0], [3.0, 1.0]]]])
    scores = jnp.array([[[[1.0, 2.0], [0.5, 0.5]]]])
    share = np.array([0.75, 0.25])
    wanted = np.sum(share * (np.log(share) - np.log(0.5))) / 2
    found = divergence(target, scores, jnp.ones((1, 1, 2, 2), bool))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
