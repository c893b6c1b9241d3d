"""Stacks whose layers share choices, and how they train."""

from functools import partial

import indexed_layer_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from vectors_of import assert_agrees

import sadsl as sa
from sadsl.catalog import models
from sadsl.layers import choice_sources, indexed_models, run_stack
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers.indexed_models import LatentDims

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, FEATURES, HEADS, K = 2, 13, 8, 2, 4
SIZES = {"dims": LatentDims(5, 7, 4, 4, 3), "index_heads": 2, "index_dim": 6}


def described(spec, model="glm_5"):
    return getattr(indexed_models, model)(FEATURES, HEADS, spec=spec, **SIZES)


def modules(specs, model="glm_5"):
    """Layers with random parameters, made without compiling their initializers."""
    found = []
    for i, spec in enumerate(specs):
        make = partial(nnx_layers.IndexedAttention, described(spec, model))
        module = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(i)
        params = {
            name: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)
            for name, (shape, _) in described(spec, model).parameters().items()
        }
        nnx.update(module, params)
        found.append(module)
    return nnx.List(found)


def inputs(length=SEQ):
    return jax.random.normal(jax.random.key(0), (BATCH, length, FEATURES))


def params_of(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize(
    ("first", "loss"), [pytest.param(0, "sparse", marks=pytest.mark.slow), (1, None)]
)
def test_a_stack_of_glm_5(first, loss):
    """Layers 2 and 3 of ``every=4`` take the choice of layer 1."""
    specs = models.glm_5(4 if loss else 3, K, every=4)[first:]
    stack, x = modules(specs), inputs()
    assert choice_sources(specs) == ((None, None, 1, 1) if loss else (None, 0))
    indexed = ["index_key" in params_of(module) for module in stack]
    assert indexed == [True, True, False, False][first : first + len(specs)]
    found = nnx.jit(partial(run_stack, loss=loss))(stack, x)
    y, total, chosen = np.asarray(x, np.float64), 0.0, None
    for module, chooses in zip(stack, indexed, strict=True):
        p = {name: np.asarray(w, np.float64) for name, w in params_of(module).items()}
        if chooses:
            run = oracle.glm_5(p, y, K)
            chosen, total = run.chosen, total + oracle.divergence(run)
        else:
            run = oracle.glm_5_reused(p, y, chosen)
        y = y + run.out
    assert_agrees(found.out, y, "stack", 1e-5)
    assert float(found.loss) == pytest.approx(total if loss else 0.0, rel=1e-5)


@pytest.mark.slow
def test_a_choice_that_is_shared_is_the_one_made_again():
    """With equal inputs and weights, a layer that reuses gives the same outputs."""
    choosing, reusing = models.hy_v4(3, K)[1:]
    first, again = (described(spec, "hy_v4") for spec in (choosing, reusing))
    params = params_of(modules([choosing], "hy_v4")[0])
    x = inputs()
    made = jax.jit(partial(first, return_choices=True))(params, x)
    taken = jax.jit(again)(params, x, choices=made.choices)
    assert list(made.choices) == [first.choice.key("listed")]
    np.testing.assert_array_equal(taken.out, made.out)
    assert_agrees(jax.jit(first)(params, x).out, made.out, "bits")
    assert dict(taken.choices) == {}


def test_stacks_that_no_layer_can_begin():
    late = models.glm_5(4, K, every=4)[2:]
    with pytest.raises(ValueError, match=r"layer 0 reuses .* are: none. Begin the st"):
        choice_sources(late)
    other = models.glm_5(1, K + 1)[0], late[0]
    with pytest.raises(ValueError, match=r"layer 1 reuses topk\(4.* are: topk\(5"):
        run_stack(modules(other), inputs())
    assert choice_sources(["causal()", "linear()"]) == (None, None)


def test_a_choice_of_another_length_is_refused():
    choosing, reusing = models.glm_5(4, K, every=4)[1:3]
    first, second = modules([choosing, reusing])

    def run(x, longer):
        made = first.attend(x, return_choices=True).choices
        return second(longer, choices=made)

    with pytest.raises(ValueError, match=r"is for 13 queries, this layer has 14"):
        jax.eval_shape(run, inputs(), inputs(14))
    with pytest.raises(ValueError, match=r"attend 2 times for layer 0: it must"):
        jax.eval_shape(
            lambda x: run_stack([first], x, lambda i, x, attend: attend(attend(x))),
            inputs(),
        )


def test_other_layers_stand_between():
    """Three layers of Kimi delta attention before one with an indexer, in Linen."""
    specs = models.glm_5_next(4, 8, 4)
    sizes = SIZES | {"dims": LatentDims(5, 7, 4, 0, 3)}
    indexed = indexed_models.glm_5_next(FEATURES, HEADS, spec=specs[-1], **sizes)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = [linen_layers.KimiDelta(HEADS) for _ in specs[:-1]]
            layers.append(linen_layers.IndexedAttention(indexed))
            assert [layer.spec for layer in layers] == list(specs)
            return run_stack(layers, x, loss="dense")

    found, _ = jax.eval_shape(Model().init_with_output, jax.random.key(0), inputs())
    assert found.out.shape == (BATCH, SEQ, FEATURES)
    assert found.loss.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sparse", "dense"])
def test_two_steps_of_training_lower_the_loss(loss):
    """Also where a layer has no indexer: it adds nothing."""
    specs = models.glm_5(4, K, every=4)[1:3]
    stack, x = modules(specs), inputs()

    @nnx.jit
    def step(stack):
        def total(stack):
            found = run_stack(stack, x, loss=loss)
            return jnp.mean(jnp.square(found.out - x[:, ::-1])) + found.loss

        value, gradients = nnx.value_and_grad(total)(stack)
        params = nnx.state(stack, nnx.Param)
        nnx.update(stack, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
        return value

    values = [float(step(stack)) for _ in range(3)]
    assert values[0] > values[1] > values[2]


def test_the_dense_warm_up_shares_nothing():
    """Every layer attends to all keys: one that reuses is a layer without a choice."""
    _, _, spec, _ = models.glm_5(4, K, every=4)
    params, x = params_of(modules([spec])[0]), inputs()
    programs = [
        str(jax.make_jaxpr(partial(described(each), loss="dense"))(params, x))
        for each in (spec, sa.latent(sa.causal()))
    ]
    assert programs[0] == programs[1]
