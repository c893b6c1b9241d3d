"""The Combiner layers: parameters, gradients, and the same output from both APIs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, traverse_util

import sadsl as sa
from sadsl import catalog
from sadsl.layers.combiner import Combiner, CombinerAttention, LinenCombinerAttention

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


def inputs(n=13):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, n, 16)), jnp.float32)


LAYERS = {
    "deepsets": Combiner("fixed", 5, features="deepsets"),
    "rowmajor": Combiner("rowmajor", 5),
}
SHAPES = {
    "deepsets": {"phi.kernel": (8, 8), "phi.bias": (8,)},
    "rowmajor": {
        "proj.mix.kernel": (2, 8, 16), "proj.norm.scale": (16,),
        "proj.norm.bias": (16,), "proj.out.kernel": (16, 2, 8),
    },
}  # fmt: skip


def shapes(tree):
    flat = traverse_util.flatten_dict(tree, sep=".")
    return {name: x.shape for name, x in flat.items()}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LAYERS)
def test_both_layers_are_one_function_of_one_tree(name):
    x = inputs()
    mine = CombinerAttention(
        2, 16, combiner=LAYERS[name], impl="reference", rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(mine, nnx.Param)
    params = nnx.to_pure_dict(state)
    theirs = LinenCombinerAttention(2, LAYERS[name], impl="reference")
    made = jax.eval_shape(theirs.init, jax.random.key(0), x)["params"]
    usual = linen.MultiHeadDotProductAttention(2, use_bias=False)
    wanted = shapes(jax.eval_shape(usual.init, jax.random.key(0), x)["params"])
    assert shapes(made) == shapes(params) == wanted | SHAPES[name]

    @jax.jit
    def both(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x), theirs.apply({"params": params}, x)

    def loss(params):
        return jnp.sum(jnp.sin(both(params, x)[0]))

    a, b = both(params, x)
    np.testing.assert_allclose(a, b, atol=1e-6)
    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    # Causal: the first tokens do not see the last ones.
    after = both(params, x.at[:, 7:].add(1.0))[0]
    np.testing.assert_array_equal(after[:, :7], a[:, :7])


@pytest.mark.sample(1)
@pytest.mark.parametrize("variant", ["logsparse", "mixture"])
def test_every_variant_is_a_layer(variant):
    causal = variant == "logsparse"
    options = Combiner(variant, 5, causal=causal, pool="mean", features="relu")
    layer = CombinerAttention(
        2, 16, combiner=options, impl="reference", rngs=nnx.Rngs(0)
    )
    run = nnx.jit(layer)
    x = inputs()
    out, changed = run(x), run(x.at[:, -1].add(1.0))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    q, k, v = (
        jnp.einsum("bsf,fhd->bshd", x, params[name]["kernel"])
        for name in ("query", "key", "value")
    )
    attended = sa.attention(q, k, v, options.spec(), impl="reference")
    wanted = jnp.einsum("bshd,hdf->bsf", attended, params["out"]["kernel"])
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    assert bool(np.any(changed[:, 0] != out[:, 0])) == (not causal)


def test_options_name_the_specs_of_the_catalogue():
    wanted = {
        "fixed": catalog.combiner_fixed(5, False, "sum", "phi"),
        "vertical": catalog.combiner_axial_vertical(5, False, "sum", "phi"),
        "horizontal": catalog.combiner_axial_horizontal(5, False, "sum", "phi"),
        "rowmajor": catalog.combiner_axial_rowmajor(5, False),
        "mixture": catalog.combiner_mixture(5, "paper", False, "sum", "phi"),
    }
    for variant, spec in wanted.items():
        options = Combiner(variant, 5, False, "sum", "deepsets")
        assert options.spec() == spec


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="variant='axial' must be one of fixed"):
        Combiner("axial")
    with pytest.raises(ValueError, match="features='gelu' must be one of identity"):
        Combiner(features="gelu")
