"""Layers with rotary positions, norms, shared keys and gates, against NumPy."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sadsl as sa
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary, document_positions
from sadsl.layers.rotary_scaling import LinearScaling, NtkScaling, YarnScaling
from sadsl.layers.transforms import (
    HeadTransforms,
    OutputGate,
    QKNorm,
    token_positions,
)

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, KV_SEQ, FEATURES, HEADS, KV_HEADS, DIM = 2, 13, 7, 10, 4, 2, 8
WINDOW = "causal() & window(5)"


class Case(NamedTuple):
    """A layer; ``cross`` has keys of another input, and given positions."""

    transforms: HeadTransforms
    options: Mapping[str, Any] = MappingProxyType({})
    spec: str = WINDOW
    cross: bool = False


CASES = {
    "qwen3_next": Case(
        HeadTransforms(
            Rotary(4, theta=1e4), QKNorm(plus_one=True, eps=1e-3), gate=OutputGate()
        )
    ),
    "over_all_heads": Case(
        HeadTransforms(
            Rotary(6, "interleaved", "last", 100.0),
            QKNorm(over="heads", eps=1e-3),
            gate=OutputGate("head", "softplus"),
        ),
        {"use_bias": ("query", "value", "gate")},
    ),
    "yarn_llama4": Case(
        HeadTransforms(
            Rotary(8, theta=50.0, scaling=YarnScaling(4.0, 100, 12.0, 2.0)),
            QKNorm(weight=False, after_rotary=True, eps=1e-3),
        ),
        {"use_bias": True},
    ),
    "gemma4_k_eq_v": Case(
        HeadTransforms(
            Rotary(4, theta=30.0, scaling=NtkScaling(3.0)),
            QKNorm(eps=1e-3),
            value_norm=RowNorm(weight=False, eps=1e-3),
            scale=1.0,
            share_kv="projected",
        )
    ),
    "deepseek_v4": Case(
        HeadTransforms(
            Rotary(4, "interleaved", "last", 20.0, scaling=YarnScaling(2.0, 60)),
            share_kv="final",
        ),
        spec=f"softmax({WINDOW}, sink=True, logits_soft_cap=2.0)",
    ),
    "equal_keys_and_values": Case(HeadTransforms(share_kv="projected")),
    "cross": Case(
        HeadTransforms(
            Rotary(8, theta=70.0, learned=True, scaling=LinearScaling(2.0)),
            QKNorm("layer", eps=1e-3),
            value_norm=RowNorm(eps=1e-3),
        ),
        {"use_bias": ("key", "out")},
        "full()",
        cross=True,
    ),
}


# --- the layer in NumPy ---


def rates(rotary):
    """The angles of a position by the formulas of the papers, pair by pair."""
    found, scaling, c = [], rotary.scaling, rotary.channels
    for i in range(c // 2):
        theta = rotary.theta
        if isinstance(scaling, NtkScaling):
            theta = theta * scaling.factor ** (c / (c - 2))
        rate = theta ** (-2 * i / c)
        if isinstance(scaling, LinearScaling):
            rate = rate / scaling.factor
        if isinstance(scaling, YarnScaling):
            wavelength = 2 * np.pi / rate
            r = scaling.original_length / wavelength
            slow, fast = scaling.beta_slow, scaling.beta_fast
            kept = 0 if r < slow else 1 if r > fast else (r - slow) / (fast - slow)
            rate = (1 - kept) * rate / scaling.factor + kept * rate
        found.append(rate)
    return np.array(found)


def turned(x, at, rotary, params, sign=1):
    """Pairs of channels as complex numbers times ``exp(i * angle)``."""
    yarn = isinstance(rotary.scaling, YarnScaling)
    grown = 0.1 * np.log(rotary.scaling.factor) + 1 if yarn else 1
    stretch = np.exp(params.get("rotary", {}).get("rotary_stretch", 0.0))
    angle = np.broadcast_to(at, x.shape[:2])[..., None] * rates(rotary) * stretch
    c = rotary.channels
    first = 0 if rotary.side == "first" else x.shape[-1] - c
    real, imaginary = np.arange(c // 2), np.arange(c // 2) + c // 2
    if rotary.layout == "interleaved":
        real, imaginary = 2 * real, 2 * real + 1
    z = x[..., first + real] + 1j * x[..., first + imaginary]
    z = z * np.exp(1j * sign * angle)[:, :, None] * grown**sign
    x = x.copy()
    x[..., first + real], x[..., first + imaginary] = z.real, z.imag
    return x


def normed(x, norm, params):
    """RMS or layer norm of the last axis, or of the last two."""
    rows = x
    if getattr(norm, "over", "head") == "heads":
        rows = x.reshape(*x.shape[:2], -1)
    if norm.kind == "layer":
        rows = rows - rows.mean(-1, keepdims=True)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + norm.eps)
    if norm.weight:
        rows = rows * (params["scale"] + norm.plus_one)
    if norm.kind == "layer" and norm.bias:
        rows = rows + params["scale_bias"]
    return rows.reshape(x.shape)


def by_definition(case, params, x, kv, at, pairs):
    """The whole layer, dense, in the dtype of the arrays."""
    t = case.transforms

    def through(name, y, axes=1):
        w = params[name]["kernel"]
        y = np.tensordot(y, w, axes=axes)
        return y + params[name].get("bias", 0.0)

    q, k = through("query", x), through("key", kv)
    v = k if t.share_kv else through("value", kv)
    if t.value_norm:
        v = normed(v, t.value_norm, params.get("value_ln"))
    steps = ["norm", "turn"]
    if t.qk_norm and t.qk_norm.after_rotary:
        steps.reverse()
    for step in steps:
        if step == "norm" and t.qk_norm:
            q = normed(q, t.qk_norm, params.get("query_ln"))
            k = normed(k, t.qk_norm, params.get("key_ln"))
        if step == "turn" and t.rotary:
            q, k = (
                turned(y, p, t.rotary, params) for y, p in zip((q, k), at, strict=True)
            )
    v = k if t.share_kv == "final" else v
    k, v = (np.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v))
    scale = DIM**-0.5 if t.scale is None else t.scale
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    sink = params.get("learned", {}).get("sink")
    if sink is not None:
        s = 2 * np.tanh(s / 2)
    e = np.where(pairs, np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink)[None, :, None, None]
    out = np.einsum("bhqk,bkhd->bqhd", e / total, v)
    if t.share_kv == "final" and t.rotary:
        out = turned(out, at[0], t.rotary, params, sign=-1)
    if t.gate:
        g = through("gate", x)
        g = 1 / (1 + np.exp(-g)) if t.gate.squash == "sigmoid" else np.log1p(np.exp(g))
        out = out * (g if t.gate.by == "channel" else g[..., None])
    return through("out", out, axes=2)


# --- the layers ---


def made(api, case, **options):
    every = {
        "num_kv_heads": KV_HEADS, "head_dim": DIM, "transforms": case.transforms,
        **case.options, **options,
    }  # fmt: skip
    if api == "linen":
        return linen_layers.SparseAttention(case.spec, HEADS, **every)
    return nnx_layers.SparseAttention(
        case.spec, HEADS, FEATURES, rngs=nnx.Rngs(0), **every
    )


@nnx.jit
def called(layer, *args, **options):
    return layer(*args, **options)


def inputs():
    x = drawn(np.random.default_rng(0), (BATCH, SEQ, FEATURES))
    return jnp.asarray(x, jnp.float32)


def drawn(rng, shape):
    return rng.normal(size=shape) * 0.5


def run(api, layer):
    """A function of parameters (nested dicts) and inputs."""
    if api == "linen":
        return lambda params, *a, **o: layer.apply({"params": params}, *a, **o)
    graph, state = nnx.split(layer)

    def call(params, *args, **options):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(*args, **options)

    return call


def arrays_of(case):
    """Random parameters with the names and shapes of the layer, and inputs."""
    rng = np.random.default_rng(1)
    make = lambda: nnx.state(made("nnx", case), nnx.Param)
    shapes = nnx.to_pure_dict(nnx.eval_shape(make))
    params = jax.tree.map(lambda x: drawn(rng, x.shape), shapes)
    x = drawn(rng, (BATCH, SEQ, FEATURES))
    if not case.cross:
        return params, x, None, {}, (np.arange(SEQ),) * 2
    kv = drawn(rng, (BATCH, KV_SEQ, FEATURES))
    at = rng.integers(0, 20, (BATCH, SEQ)), rng.integers(0, 20, (1, KV_SEQ))
    named = dict(zip(("positions", "kv_positions"), at, strict=True))
    return params, x, kv, named, at


@pytest.mark.sample(1)
@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_definition(name, api):
    case = CASES[name]
    params, x, kv, named, at = arrays_of(case)
    n = SEQ if kv is None else KV_SEQ
    spec = sa.parse(WINDOW if not case.cross else case.spec)
    pairs = spec.dense(SEQ, n)[None]
    weights = drawn(np.random.default_rng(2), (BATCH, SEQ, FEATURES))

    def wanted(params, x, kv):
        return by_definition(case, params, x, x if kv is None else kv, at, pairs)

    with jax.enable_x64(True):
        # The parameters are replaced: random ones would cost compilations.
        zeros = jax.nn.initializers.zeros
        layer = made(api, case, param_dtype=jnp.float64, kernel_init=zeros)
        call = run(api, layer)

        def loss(params, x, kv):
            found = call(params, x, kv, **named)
            return jnp.sum(found * weights), found

        both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        as_jax = jax.tree.map(jnp.asarray, (params, x, kv))
        slopes, found = both(*as_jax)
        slopes = jax.tree.map(np.asarray, slopes)
    np.testing.assert_allclose(found, wanted(params, x, kv), atol=1e-12)
    # The slope along a random direction of each array, from central differences.
    rng, step = np.random.default_rng(3), 1e-5
    leaves, tree = jax.tree.flatten((params, x))
    for i, (leaf, slope) in enumerate(
        zip(leaves, jax.tree.leaves(slopes), strict=True)
    ):
        along = drawn(rng, leaf.shape)
        ends = []
        for sign in (1, -1):
            moved = [*leaves[:i], leaf + sign * step * along, *leaves[i + 1 :]]
            p, y = jax.tree.unflatten(tree, moved)
            ends.append((wanted(p, y, kv) * weights).sum())
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(
            (slope * along).sum(), expected, atol=2e-8, rtol=1e-6
        )


def test_linen_has_the_parameters_of_nnx():
    x = jnp.zeros((BATCH, SEQ, FEATURES))
    for name, case in CASES.items():
        kv = jnp.zeros((BATCH, KV_SEQ, FEATURES)) if case.cross else None
        make = lambda case=case: nnx.state(made("nnx", case), nnx.Param)
        wanted = nnx.to_pure_dict(nnx.eval_shape(make))
        init = made("linen", case).init
        found = jax.eval_shape(init, jax.random.key(0), x, kv)["params"]
        shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert shapes(found) == shapes(wanted), name


# --- positions ---


PACKED = np.array([[5] * 4 + [9] * 9, [1] * 13])


def test_positions_of_packed_documents_restart():
    wanted = [[*range(4), *range(9)], [*range(13)]]
    np.testing.assert_array_equal(document_positions(PACKED), wanted)
    at = token_positions((PACKED.shape, None), None, None, (PACKED, PACKED))
    np.testing.assert_array_equal(at.q, wanted)
    assert at.kv is at.q
    at = token_positions((PACKED.shape, (2, 3)), np.arange(13), None, (PACKED, None))
    np.testing.assert_array_equal(at.q, np.arange(13))
    np.testing.assert_array_equal(at.kv, np.arange(3))


@pytest.mark.slow
def test_packed_documents_are_documents_by_themselves():
    case = CASES["qwen3_next"]._replace(spec="causal() & segments()")
    layer, x = made("nnx", case), inputs()
    packed = called(layer, x, q_segment_ids=PACKED, kv_segment_ids=PACKED)
    alone = made("nnx", case._replace(spec="causal()"))
    for part in (slice(0, 4), slice(4, None)):
        found = called(alone, x[:1, part])
        np.testing.assert_allclose(packed[:1, part], found, atol=2e-6)
    at = document_positions(PACKED)
    ids = {"q_segment_ids": PACKED, "kv_segment_ids": PACKED}
    np.testing.assert_array_equal(packed, called(layer, x, positions=at, **ids))


@pytest.mark.slow
def test_positions_of_a_continued_sequence():
    """Queries at a traced offset give the rows of the whole sequence."""
    layer, x = made("nnx", CASES["deepseek_v4"]._replace(spec="full()")), inputs()
    later = nnx.jit(lambda layer, at: layer(x[:, 5:], x, positions=at))
    found = later(layer, 5 + jnp.arange(SEQ - 5))
    np.testing.assert_allclose(found, called(layer, x)[:, 5:], atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": np.arange(12)}, r"positions has shape \(12,\): it must be \(13"),
        ({"kv_positions": np.zeros((3, 13), int)}, r"kv_positions has shape \(3, 13\)"),
        ({"positions": np.arange(13.0)}, r"positions has dtype float.*integers"),
    ],
)
def test_positions_that_do_not_fit(options, message):
    x = jnp.zeros((BATCH, SEQ, FEATURES))
    with pytest.raises(ValueError, match=message):
        made("nnx", CASES["qwen3_next"])(x, **options)
