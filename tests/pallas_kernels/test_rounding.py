"""bf16 inputs with large values lose no accuracy in the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from calls import BACKENDS, IMPLS

import sadsl as sa

# The largest error relative to the largest value, in units of the last bit of bf16.
# Gradients of q and k hold delta, the sum of do times an output rounded to bf16.
LIMITS = {"o": 1.0, "lse": 0.02, "dq": 3.0, "dk": 3.0, "dv": 1.0}
UNIT = 2.0**-8


def heads_first(x):
    return np.swapaxes(np.asarray(x, np.float64), 1, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("dim", "soft_cap"),
    [
        (24, None),
        pytest.param(16, None, marks=pytest.mark.slow),
        pytest.param(64, None, marks=pytest.mark.slow),
        pytest.param(128, None, marks=pytest.mark.slow),
        pytest.param(64, 30.0, marks=pytest.mark.slow),
        pytest.param(128, 30.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_lose_no_bits(impl, dim, soft_cap):
    """Scores of hundreds: rounding a scaled q to bf16 is off by 12 to 60 units."""
    rng = np.random.default_rng(dim)
    shape = 1, 50, 2, dim
    q, k, v, do = (jnp.asarray(10 * rng.normal(size=shape), "bfloat16") for _ in "qkvo")
    spec = sa.softmax(sa.causal(), logits_soft_cap=soft_cap)

    def call(q, k, v):
        options = BACKENDS[impl] | {"impl": impl, "return_lse": True}
        return sa.attention(q, k, v, spec, **options)

    (o, lse), pull = jax.vjp(call, q, k, v)
    dq, dk, dv = (heads_first(x) for x in pull((do, jnp.zeros_like(lse))))
    found = oracle.Result(heads_first(o), np.asarray(lse, np.float64), dq, dk, dv)
    pairs = np.broadcast_to(np.tril(np.ones((50, 50), bool)), (1, 2, 50, 50))
    arrays = (heads_first(x) for x in (q, k, v))
    expected = oracle.with_gradients(
        *arrays, pairs, dim**-0.5, soft_cap, do=heads_first(do)
    )
    for name, a, b in zip(found._fields, found, expected, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max() / UNIT
        assert error <= LIMITS[name], f"{name}: off by {error:.2f} units of bf16"
