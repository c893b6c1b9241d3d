"""Layers with rotary positions, norms, shared keys and gates, against NumPy."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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
from sadsl.layers.rotary import Rotary, document_positions
from sadsl.layers.rotary_scaling import LinearScaling, NtkScaling, YarnScaling
from sadsl.layers.transforms import HeadTransforms, OutputGate, QKNorm

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
    shapes = nnx.to_pure_dict(nnx.state(made("nnx", case), nnx.Param))
    params = jax.tree.map(lambda x: drawn(rng, x.shape), shapes)
    x = drawn(rng, (BATCH, SEQ, FEATURES))
    if not case.cross:
        return params, x, None, {}, (np.arange(SEQ),) * 2
    kv = drawn(rng, (BATCH, KV_SEQ, FEATURES))
    at = rng.integers(0, 20, (BATCH, SEQ)), rng.integers(0, 20, (1, KV_SEQ))
    named = dict(zip(("positions", "kv_positions"), at, strict=True))
    return params, x, kv, named, at


@pytest.mark.sample(4)
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
        call = run(api, made(api, case, param_dtype=jnp.float64))

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


# --- published outputs ---


def test_the_gated_output_of_qwen3_next():
    """The layer with projections that copy, on the arrays of the original."""
    given, options = cases("qwen3_next")["full"]
    names = "q", "k", "v", "gate_logits"
    x = np.concatenate([given[n].reshape(1, 37, -1) for n in names], axis=-1)
    layer = nnx_layers.SparseAttention(
        options["map"], 4, x.shape[-1], num_kv_heads=2, head_dim=8, out_features=32,
        transforms=HeadTransforms(scale=options["scale"], gate=OutputGate()),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    projections, first = (layer.query, layer.key, layer.value, layer.gate), 0
    for linear in projections:
        shape = linear.kernel.shape
        width = shape[1] * shape[2]
        copy = jnp.eye(shape[0], width, -first)
        linear.kernel[...], first = copy.reshape(shape), first + width
    layer.out.kernel[...] = jnp.eye(32).reshape(4, 8, 32)
    assert_agrees(called(layer, x), given["gated_out"], "gated_out")


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


# --- positions ---


def test_positions_of_packed_documents_restart():
    ids = np.array([[5] * 4 + [9] * 9, [1] * 13])
    at = document_positions(ids)
    np.testing.assert_array_equal(at, [[*range(4), *range(9)], range(13)])
    case = CASES["qwen3_next"]._replace(spec="causal() & segments()")
    layer, x = made("nnx", case), inputs()
    packed = called(layer, x, q_segment_ids=ids, kv_segment_ids=ids)
    given = called(layer, x, positions=at, q_segment_ids=ids, kv_segment_ids=ids)
    np.testing.assert_array_equal(packed, given)
    alone = made("nnx", case._replace(spec="causal()"))
    np.testing.assert_allclose(packed[:1, 4:], called(alone, x[:1, 4:]), atol=2e-6)


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
    assert CASES["equal_keys_and_values"].transforms.term(
        sa.softmax(sa.causal()), DIM, None
    ) == sa.softmax(sa.causal(), values=(0, DIM))


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
