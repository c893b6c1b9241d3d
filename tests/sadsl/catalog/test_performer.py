"""Random features of Performer: unbiased, orthogonal, redrawable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl import catalog


def test_products_estimate_the_softmax_kernel():
    """The error falls as the root of the number of features."""
    x, y = (0.35 * jax.random.normal(jax.random.key(i), (40, 8)) for i in (1, 2))
    want = np.exp(np.einsum("id,jd->ij", *(np.float64(z) for z in (x, y))) * 8**-0.5)
    errors = []
    for count in (64, 64 * 64):
        phi = catalog.favor_features(jax.random.key(0), 8, count)
        found = jnp.einsum("if,jf->ij", phi(x), phi(y))
        errors.append(np.abs(found / want - 1).mean())
    assert errors[1] < 0.05
    assert 4 < errors[0] / errors[1] < 16


def test_rows_are_orthogonal_and_redrawn():
    first, second = (
        catalog.favor_features(jax.random.key(i), 8, 12).weights for i in (0, 1)
    )
    gram = np.asarray(first[:8] @ first[:8].T)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-5
    assert first.shape == (12, 8)
    assert np.abs(first - second).max() > 0.1
    loose = catalog.favor_features(jax.random.key(0), 8, 12, orthogonal=False).weights
    gram = np.asarray(loose[:8] @ loose[:8].T)
    assert np.abs(gram - np.diag(np.diag(gram))).max() > 0.5


def test_attention_is_near_softmax():
    q, k, v = (
        0.5 * jax.random.normal(jax.random.key(i), (1, 30, 2, 8)) for i in range(3)
    )

    @jax.jit
    def run(phi):
        return sa.attention(q, k, v, catalog.performer(), operands={"phi": phi})

    out = run(catalog.favor_features(jax.random.key(3), 8, 4096))
    want = sa.attention(q, k, v, sa.causal())
    assert np.abs(out - want).mean() < 0.06 * np.abs(want).mean()


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_sizes(sizes):
    with pytest.raises(ValueError, match=r"favor_features: .*=0 must be"):
        catalog.favor_features(jax.random.key(0), *sizes)
