"""Transforms of published models, scaling of rotary positions, lists, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from vectors_of import assert_agrees, cases

import sadsl as sa
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary
from sadsl.layers.rotary_scaling import LinearScaling, NtkScaling, YarnScaling
from sadsl.layers.transforms import HeadTransforms, OutputGate, QKNorm

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, FEATURES, HEADS, DIM = 2, 13, 10, 4, 8
WINDOW = "causal() & window(5)"


@nnx.jit
def called(layer, x):
    return layer(x)


# --- published outputs ---


def test_the_gated_output_of_qwen3_next():
    """The layer with projections that copy, on the arrays of the original."""
    given, options = cases("qwen3_next")["full"]
    names = "q", "k", "v", "gate_logits"
    x = np.concatenate([given[n].reshape(1, 37, -1) for n in names], axis=-1)
    layer = nnx_layers.SparseAttention(
        options["map"], 4, x.shape[-1], num_kv_heads=2, head_dim=8, out_features=32,
        transforms=HeadTransforms(scale=options["scale"], gate=OutputGate()),
        kernel_init=jax.nn.initializers.zeros, rngs=nnx.Rngs(0),
    )  # fmt: skip
    projections, first = (layer.query, layer.key, layer.value, layer.gate), 0
    for linear in projections:
        shape = linear.kernel.shape
        width = shape[1] * shape[2]
        copy = np.eye(shape[0], width, -first, dtype=np.float32)
        linear.kernel[...] = jnp.asarray(copy.reshape(shape))
        first += width
    copy = np.eye(32, dtype=np.float32).reshape(4, 8, 32)
    layer.out.kernel[...] = jnp.asarray(copy)
    assert_agrees(called(layer, x), given["gated_out"], "gated_out")


@pytest.mark.slow
def test_the_rotation_of_shared_keys_of_deepseek_v4():
    """Its output turned back, from arrays before their rotation."""
    given, options = cases("deepseek_v4")["sliding"]
    n, dim = 67, 16
    angle = np.arctan2(given["sin"].astype(np.float64), given["cos"])
    rotary = Rotary(
        4, "interleaved", "last", theta=float(angle[1, 0] / angle[1, 1]) ** 2
    )
    np.testing.assert_allclose(rotary.rates(), angle[1], rtol=1e-6)
    unturned = jax.jit(lambda x: rotary(x, jnp.arange(n), {}, back=True))
    raw = [unturned(given[name]).reshape(1, n, -1) for name in ("q", "kv")]
    x = jnp.concatenate(raw, axis=-1)
    layer = nnx_layers.SparseAttention(
        f"softmax({options['map']}, sink=True)", 4, 80, num_kv_heads=1, head_dim=dim,
        out_features=64, rngs=nnx.Rngs(0),
        transforms=HeadTransforms(rotary, scale=options["scale"], share_kv="final"),
    )  # fmt: skip
    assert layer.value is None
    layer.query.kernel[...] = jnp.eye(80, 64).reshape(80, 4, dim)
    layer.key.kernel[...] = jnp.eye(80, dim, -64).reshape(80, 1, dim)
    layer.out.kernel[...] = jnp.eye(64).reshape(4, dim, 64)
    layer.learned["sink"][...] = jnp.asarray(given["sinks"])
    found = called(layer, x).reshape(1, n, 4, dim)
    assert_agrees(found, given["derotated"], "derotated", bound=1e-5)


# --- YaRN as code has it ---


def test_the_ramp_of_yarn_by_index():
    """Beside a loop over pairs, at the settings of gpt-oss (2025)."""
    pairs, theta, length = 32, 150000.0, 4096
    low, high = (
        pairs * np.log(length / (turns * 2 * np.pi)) / np.log(theta)
        for turns in (32, 1)
    )
    for ramp, (a, b) in {
        "index": (low, high),
        "whole_index": (np.floor(low), np.ceil(high)),
    }.items():
        scaling = YarnScaling(32.0, length, ramp=ramp)
        assert scaling.magnitude == pytest.approx(1.3466, abs=1e-4)
        found = scaling.rates(theta, 2 * pairs)
        for i in range(pairs):
            rate, slowed = theta ** (-i / pairs), min(max((i - a) / (b - a), 0), 1)
            wanted = rate / 32 * slowed + rate * (1 - slowed)
            assert found[i] == pytest.approx(wanted, rel=1e-12), (ramp, i)
    assert YarnScaling(4.0, 64, attention_factor=1.5).magnitude == 1.5


# --- lists by layer ---


def test_a_list_of_transforms_by_layer():
    rotary = HeadTransforms(Rotary(4))
    specs = sa.read_head_plan({"layers": ["causal()", WINDOW]}, num_heads=HEADS)
    options = {"head_dim": DIM, "transforms": [HeadTransforms(), rotary]}
    for i, (spec, wanted) in enumerate(zip(specs, options["transforms"], strict=True)):
        for given in (specs, spec):
            layer = nnx_layers.SparseAttention(
                given, HEADS, FEATURES, layer=i, rngs=nnx.Rngs(0), **options
            )
            assert (layer.term, layer.transforms) == (sa.softmax(spec), wanted)
        layer = linen_layers.SparseAttention(specs, HEADS, layer=i, **options)
        assert (layer.spec, layer.transforms) == (sa.softmax(spec), wanted)


def test_equal_keys_and_values_are_loaded_once():
    plain = sa.softmax(sa.causal())
    once = sa.softmax(sa.causal(), values=(0, DIM))
    rotary = Rotary(4)
    for transforms, other, wanted in (
        (HeadTransforms(share_kv="projected"), None, once),
        (HeadTransforms(share_kv="projected"), lambda q, k: (q, k), plain),
        (HeadTransforms(rotary, share_kv="projected"), None, plain),
        (HeadTransforms(rotary, share_kv="final"), None, once),
        (HeadTransforms(), None, plain),
    ):
        assert transforms.term(plain, DIM, other) == wanted


PLAN = sa.read_head_plan({"layers": [{"heads": ["causal()"] * 2 + ["full()"]}] * 2})


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (PLAN, {"layer": 0}, r"3 groups of heads, but the layer has 4 query heads"),
        ("heads((causal(), 2), (linear(), 1))", {}, r"for 3 heads, but .* has 4 query"),
        (PLAN, {"layer": 2}, r"layer=2 of a list of 2 specs"),
        (["causal()"], {"layer": 0, "transforms": [HeadTransforms()] * 2},
         r"spec is a list of 1, and transforms of 2"),
        ("causal()", {"transforms": [HeadTransforms()]}, r"transforms is a list of 1"),
        ("causal()", {"layer": 3, "transforms": [HeadTransforms()]},
         r"layer=3 of a list of 1 transforms"),
        ("causal()", {"transforms": HeadTransforms(Rotary(10))},
         r"10 channels turn, but head_dim=8: turn fewer"),
        ("causal()", {"use_bias": ("query", "gate")},
         r"use_bias names 'gate', which is no projection"),
        ("causal()", {"use_bias": ["value"],
                      "transforms": HeadTransforms(share_kv="final")},
         r"use_bias names 'value'"),
        ("causal()", {"num_kv_heads": 3}, r"num_heads=4 must be a multiple"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be(spec, options, message):
    with pytest.raises(ValueError, match=message):
        nnx_layers.SparseAttention(
            spec, HEADS, FEATURES, head_dim=DIM, rngs=nnx.Rngs(0), **options
        )
    x = jnp.zeros((BATCH, SEQ, FEATURES))
    with pytest.raises(ValueError, match=message):
        linen_layers.SparseAttention(spec, HEADS, head_dim=DIM, **options).init(
            jax.random.key(0), x
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.5), r"factor=0.5 must be at least 1"),
        (lambda: Rotary(2, scaling=NtkScaling(2.0)), r"channels=2 have one pair"),
        (lambda: YarnScaling(2.0, 0), r"original_length=0 must be at least 1"),
        (lambda: YarnScaling(2.0, 64, 1.0, 1.0), r"beta_fast=1.0 must be above"),
        (lambda: YarnScaling(2.0, 64, attention_factor=0.0), r"must be positive"),
        (lambda: QKNorm(plus_one=True, weight=False), r"QKNorm: plus_one=True adds 1"),
        (
            lambda: HeadTransforms(value_norm=RowNorm(), share_kv="final"),
            r"share_kv='final', whose values are the finished keys",
        ),
    ],
)
def test_transforms_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
