"""Layers decode as they compute whole sequences, in both Flax APIs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sadsl as sa
from sadsl.layers import linen as linen_layers
from sadsl.layers.nnx import SparseAttention
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary
from sadsl.layers.transforms import HeadTransforms, OutputGate, QKNorm

N, FEATURES = 23, 16
RING = sa.causal() & (sa.window(5) | sa.sinks(2))
LAYERS = {
    "rotary": (RING, HeadTransforms(Rotary(4), QKNorm(), gate=OutputGate("head"))),
    "shared": (sa.causal(), HeadTransforms(Rotary(4, side="last"), share_kv="final")),
    "values": (
        RING,
        HeadTransforms(Rotary(4), value_norm=RowNorm(), share_kv="projected"),
    ),
    "learned": (sa.softmax(RING, sink=True, bias=sa.distance_bias("d", 4)), None),
    "gated": (sa.gated(RING, sa.linear(decay="g")), HeadTransforms(Rotary(4))),
    "delta": (sa.delta(decay="g"), None),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LAYERS)
def test_pieces_equal_the_whole(name):
    spec, transforms = LAYERS[name]
    operands = {"beta": jnp.full((2, N, 2), 0.5)} if name == "delta" else {}
    layer = SparseAttention(
        spec, 4, FEATURES, num_kv_heads=4 if name == "delta" else 2,
        transforms=transforms, rngs=nnx.Rngs(0),
    )  # fmt: skip
    if name == "delta":
        operands = {"beta": jnp.full((2, N, 4), 0.5)}
    x = jax.random.normal(jax.random.key(1), (2, N, FEATURES))
    expected = layer(x, operands=operands)
    cache = layer.init_cache(2, N, operands=operands)

    @nnx.jit
    def decode(layer, x, cache, operands):
        return layer.decode(x, cache, operands=operands)

    found, at = [], 0
    for size in (9, *[1] * (N - 9)):
        own = {n: y[:, at : at + size] for n, y in operands.items()}
        y, cache = decode(layer, x[:, at : at + size], cache, own)
        found.append(y)
        at += size
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_function_of_queries_and_keys_gets_positions():
    def turned(q, k, positions=None):
        at = jnp.arange(q.shape[1]) if positions is None else positions
        factor = 1 + 0.1 * at[None, :, None, None].astype(q.dtype)
        return q * factor, k / factor

    layer = SparseAttention(RING, 2, 8, transform_qk=turned, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 7, 8))
    cache = layer.init_cache(1, 7)
    first, cache = layer.decode(x[:, :4], cache)
    rest, cache = layer.decode(x[:, 4:], cache)
    found = jnp.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(found, layer(x), rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="holds 7 tokens, and 1 more"):
        layer.decode(x[:, :1], cache)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["rotary", "learned", "gated"])
def test_linen_decodes_as_it_computes(name):
    spec, transforms = LAYERS[name]
    layer = linen_layers.SparseAttention(spec, 4, num_kv_heads=2, transforms=transforms)
    x = jax.random.normal(jax.random.key(1), (2, N, FEATURES))
    expected, variables = layer.init_with_output(jax.random.key(0), x)
    cache = layer.init_cache(2, N, FEATURES)
    decode = jax.jit(lambda x, cache: layer.apply(variables, x, cache=cache))
    found, at = [], 0
    for size in (9, *[1] * (N - 9)):
        y, cache = decode(x[:, at : at + size], cache)
        found.append(y)
        at += size
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="kv, positions"):
        layer.apply(variables, x, x, cache=cache)
