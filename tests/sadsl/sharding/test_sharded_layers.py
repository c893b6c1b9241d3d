"""Layers on a mesh equal the layers of one device, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType

import sadsl as sa
from sadsl.layers import attention_fn
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers

SPEC = "causal() & (window(5) | sinks(2))"
AUTO = (AxisType.Auto,) * 2
AXES = sa.MeshAxes(
    jax.make_mesh((2, 4), ("data", "seq"), axis_types=AUTO), batch="data",
    sequence="seq",
)  # fmt: skip


def inputs(features=16):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 37, features)), jnp.float32)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.usefixtures("quick")
def test_nnx_layers(kind):
    def layer(axes):
        options = {"mesh_axes": axes, "rngs": nnx.Rngs(0)}
        if kind == "linear":
            return nnx_layers.LinearAttention(16, 2, **options)
        return nnx_layers.SparseAttention(SPEC, 4, 16, num_kv_heads=2, **options)

    def run(layer):
        graph, state = nnx.split(layer)

        @jax.jit
        def loss(state):
            return jnp.sin(nnx.merge(graph, state)(inputs())).sum()

        return jax.value_and_grad(loss)(state)

    found, wanted = run(layer(AXES)), run(layer(None))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.usefixtures("quick")
def test_linen_layers(kind):
    def layer(axes):
        if kind == "linear":
            return linen_layers.LinearAttention(2, mesh_axes=axes)
        return linen_layers.SparseAttention(SPEC, 4, mesh_axes=axes)

    params = layer(None).init(jax.random.key(0), inputs())
    found, wanted = (
        jax.jit(layer(axes).apply)(params, inputs()) for axes in (AXES, None)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.usefixtures("quick")
def test_flax_attention_with_our_function():
    def layer(axes):
        return linen.MultiHeadDotProductAttention(
            2, attention_fn=attention_fn(SPEC, mesh_axes=axes)
        )

    params = layer(None).init(jax.random.key(0), inputs())
    found, wanted = (
        jax.jit(layer(axes).apply)(params, inputs()) for axes in (AXES, None)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_mask_of_a_cache_is_refused():
    x, slots = jnp.zeros((2, 1, 2, 8)), jnp.zeros((2, 4, 2, 8))
    mask = jnp.ones((2, 1, 1, 4), bool)
    near = attention_fn(SPEC, mesh_axes=AXES)
    with pytest.raises(NotImplementedError, match="decoding is not dealt"):
        near(x, slots, slots, mask=mask)
