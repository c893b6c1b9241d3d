"""Biases as values: their text, operands, lowering and errors."""

import math

import calls
import jax
import jax.numpy as jnp
import pytest
from t5_buckets import bucket_of

import sadsl as sa
from sadsl.maps.numbers import weights
from sadsl.maps.symbols import minimum, operand, table
from sadsl.terms.base import LayerSizes, Learned
from sadsl.terms.biases import (
    alibi,
    alibi_slopes,
    bias,
    distance_bias,
    key_bias,
    pair_bias,
    t5_bias,
    t5_buckets,
)


@pytest.mark.parametrize(
    "x",
    [
        alibi(),
        alibi((0.5, 0.25)),
        t5_bias("b", 16, 64, bidirectional=True),
        distance_bias("d", 5, right=2) + (pair_bias("p") + key_bias("k")),
        bias(lambda q, k, h: 0.5 * table((0.5, 2.0))[h] - weights("c")[h, q % 4, k]),
        bias(lambda q, k: 2 - weights("a")[minimum(q, 3)] * -1.5 + q // 2),
        bias(lambda q, k: operand("p")[q] - k),
    ],
)
def test_text(x):
    """A bias is read from its repr, inside a term."""
    term = sa.softmax(sa.causal(), bias=x)
    assert sa.parse(repr(term)) == term
    assert hash(sa.parse(repr(term))) == hash(term)


def test_slopes():
    """Powers of two as in the paper, other numbers of heads as in its code."""
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    of_12 = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx(of_12)


@pytest.mark.parametrize("buckets", [8, 16, 32])
def test_buckets(buckets):
    """Those of the published code, which reckons in float32."""
    found = t5_buckets(buckets, 100)
    assert list(found) == [bucket_of(d, buckets, 100) for d in range(101)]


def test_what_a_layer_learns():
    """Arrays whose size no length decides, for so many heads."""
    sizes = LayerSizes(4, 2, 8, 8)
    assert t5_bias().learned(sizes) == {"bias": Learned((4, 32))}
    x = distance_bias("d", 5, 1) + pair_bias("p")
    assert x.learned(sizes) == {"d": Learned((4, 7))}
    assert x.operands == {"d": 2, "p": 3}
    assert x.reads("p")
    assert not x.reads("q")
    spec = sa.softmax(sa.causal(), bias=x)
    assert spec.reads("d")


SHAPES = [jax.ShapeDtypeStruct((1, 512, h, 64), jnp.bfloat16) for h in (4, 2, 2)]
LOWERED = sa.softmax(
    sa.causal() & sa.window(128), bias=alibi() + t5_bias() + pair_bias("pair")
)
OPERANDS = {
    "bias": jax.ShapeDtypeStruct((4, 32), jnp.float32),
    "pair": jax.ShapeDtypeStruct((1, 1, 512, 512), jnp.float32),
}


def test_lowering_for_gpus():
    """All three kernels, with a bias of every kind."""
    low = sa.lower(LOWERED, *SHAPES, target="h100", operands=OPERANDS, gradient=True)
    assert low.module.count("tt.func") == 3


@pytest.mark.slow
def test_compiling_for_a_tpu():
    """The kernel loads windows of strips and of pairs."""
    low = sa.lower(LOWERED, *SHAPES, target="tpu-v5e", operands=OPERANDS)
    assert low.compile().memory()["code"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
def test_compiling_gradients_for_tpus(target):
    """All three kernels."""
    low = sa.lower(LOWERED, *SHAPES, target=target, operands=OPERANDS, gradient=True)
    assert low.compile().memory()["code"] > 0


def call_with(x, **operands):
    q, k, v, _ = calls.arrays(1, 10, 12, 4, 2, 8, 8)
    spec = sa.softmax(sa.causal(), bias=x)
    arrays = {n: jnp.zeros(s, jnp.float32) for n, s in operands.items()}
    return sa.attention(q, k, v, spec, operands=arrays, impl="reference")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call_with(t5_bias()), r"`weights\('bias'\)\[h, table.*not given"),
        (lambda: call_with(t5_bias(), bias=(4, 9)), "4 or 1, 10 entries"),
        (lambda: call_with(key_bias("k"), k=(3, 12)), "4 or 1, 12 entries"),
        (lambda: call_with(key_bias("k"), k=(12,)), "must have 2 axes"),
        (lambda: call_with(key_bias("k"), k=(4, 12), z=(3,)), "operand 'z'"),
        (lambda: call_with(bias(lambda q, k: weights("a")[q - k]), a=(20,)), "below 0"),
        (lambda: call_with(alibi((0.5, 0.25))), "table of 2 at `h`.* from 0 to 3"),
        (lambda: t5_bias(num_buckets=1), "num_buckets=1 must be at least 2"),
        (lambda: t5_bias(num_buckets=5, bidirectional=True), "even and at least 4"),
        (lambda: t5_bias(max_distance=16), "max_distance=16 must be above 16"),
        (lambda: distance_bias("d", 2, -3), "there is no distance"),
        (lambda: alibi((math.inf,)), "finite constants, not inf"),
        (lambda: weights("a b"), "the name of an operand, a Python identifier"),
        (
            lambda: sa.parse("softmax(causal(), bias=bias(lambda q: q))"),
            "needs `lambda",
        ),
    ],
)
def test_bad_values(make, message):
    """The value, the rule and the way out."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bias(lambda q: q), "not of 1 arguments"),
        (lambda: bias(lambda q, k: "x"), "numbers of positions, not of 'x'"),
        (lambda: bias(lambda q, k: weights("a")[0.5]), "integers of positions, not"),
        (lambda: bias(lambda q, k: weights("a")[q] / 2), "a traced map takes integers"),
        (lambda: alibi() + 1, "`\\+` adds a bias to a bias, not 1"),
        (lambda: sa.where(lambda q, k: 0.5 * q), "expected a comparison"),
    ],
)
def test_bad_types(make, message):
    """What a bias cannot be made of."""
    with pytest.raises(TypeError, match=message):
        make()
