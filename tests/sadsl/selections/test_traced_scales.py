"""Selections that multiply by the scale of the call take a traced one of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.selections import kept_keys, stripes, vertical_slash
from sadsl.selections.factorised_topk import factorised_topk

SPECS = {
    "stripes": stripes(2.0, init=2, block=4, step=1),
    "kept_keys": kept_keys(16, 4, last=4, pool=1),
    "vertical_slash": vertical_slash(3, 3, last=4),
    "factorised_topk": factorised_topk(0.25, 2, 0.0),
}


def operands(spec, n, heads, dim):
    """The weights of a predictor, if the selection has one."""
    wide, low = (heads, dim + 1, 3), (n, 4)
    shapes = {"q": wide, "k": wide, "down": low, "basis": low}
    shapes = {f"predictor_{name}": shape for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    names = spec.operands
    return {x: jnp.asarray(rng.normal(size=shapes[x]), jnp.float32) for x in names}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SPECS)
def test_a_traced_scale_of_float64_chooses_as_a_number_does(name):
    spec, n = SPECS[name], 21
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, n, 2, 8)), jnp.float32) for _ in range(2))
    given = operands(spec, n, 2, 8)
    wanted = sa.select(spec, q, k, operands=given, sm_scale=0.3)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        call = jax.jit(
            lambda scale: sa.select(spec, q, k, operands=given, sm_scale=scale)
        )
        found = call(jnp.asarray(0.3, jnp.float64))
    assert any(np.asarray(x).any() for x in wanted.values())
    for part in wanted:
        np.testing.assert_array_equal(found[part], wanted[part])
