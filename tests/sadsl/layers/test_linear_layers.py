"""The linear layers of both Flax APIs against NumPy loops, and when they decode."""

import inspect
from dataclasses import fields
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import linear_layer_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from vectors_of import assert_agrees

import sadsl as sa
from sadsl.layers import linear_linen, linear_models
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers.linear import Running

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, FEATURES, HEADS = 2, 13, 8, 2
# Four chunks, the last of one token.
SMALL = Running(config=sa.KernelConfig(block_kv=4))


class Case(NamedTuple):
    """A layer: its class, its options, and its definition."""

    name: str
    options: dict[str, Any]
    loop: Any


CASES = {
    "linear": Case("LinearAttention", {}, oracle.linear_attention),
    "gla": Case("GatedLinearAttention", {"head_dim": 3}, oracle.gated_linear_attention),
    "delta": Case("DeltaNet", {"head_dim_v": 5}, oracle.delta_net),
    "gated_delta": Case(
        "GatedDeltaNet",
        {"num_v_heads": 4, "head_dim": 6, "head_dim_v": 3, "negative": True},
        oracle.gated_delta_net,
    ),
    "kimi": Case("KimiDelta", {}, oracle.kimi_delta),
    "ling": Case(
        "KimiDelta", {"low_rank": False, "lower": -5.0, "norm_eps": 1e-6}, oracle.ling
    ),
    "light_net": Case("LightNet", {"gate_rank": 3}, oracle.light_net),
}
EVERY = pytest.mark.parametrize("name", CASES)
# Of a test that compiles much, the case that compiles fastest runs in `make test`.
ONE = pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != "linear")) for x in CASES],
)


def drawn(name):
    """The description of a case, random parameters, and inputs."""
    case = CASES[name]
    describe = getattr(nnx_layers, case.name).describe
    layer = describe(FEATURES, HEADS, **case.options)
    rng = np.random.default_rng(len(name))
    params = {
        key: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)
        for key, (shape, _) in layer.parameters().items()
    }
    x = jnp.asarray(rng.normal(size=(BATCH, SEQ, FEATURES)), jnp.float32)
    return layer, params, x


def loss_weights(y):
    return np.cos(np.arange(y.size)).reshape(y.shape)


@cache
def full_pass(name):
    """Outputs and the last state of a full pass."""
    layer, params, x = drawn(name)
    return jax.jit(partial(layer, return_state=True, running=SMALL))(params, x)


@pytest.mark.sample(2)
@EVERY
def test_is_what_the_paper_says(name):
    _, params, x = drawn(name)
    wanted = oracle.layer(CASES[name].loop, params, x)
    assert_agrees(full_pass(name)[0], wanted, name, 1e-5)


@pytest.mark.sample(1)
@EVERY
def test_gradients_are_those_of_the_definition(name):
    """Along a random direction, by central differences in float64."""
    layer, params, x = drawn(name)
    rng = np.random.default_rng(1)
    both = {**params, "x": x}
    steps = {key: rng.normal(size=y.shape) for key, y in both.items()}

    @jax.jit
    @jax.grad
    def gradients(both):
        at = dict(both)
        y = layer(at, at.pop("x"), running=SMALL)
        return jnp.sum(y * loss_weights(y).astype(np.float32))

    found = 0
    for key, gradient in gradients(both).items():
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, key
        found += np.sum(np.asarray(gradient, np.float64) * steps[key])

    def moved(by):
        at = {k: np.asarray(y, np.float64) + by * steps[k] for k, y in both.items()}
        y = oracle.layer(CASES[name].loop, at, at.pop("x"))
        return np.sum(y * loss_weights(y))

    wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert found == pytest.approx(wanted, rel=2e-4)


@pytest.mark.slow
@EVERY
def test_prefill_and_steps_are_the_full_pass(name):
    layer, params, x = drawn(name)
    whole, end = full_pass(name)
    call = jax.jit(partial(layer, return_state=True, running=SMALL))
    first = 9
    y, state = call(params, x[:, :first], state=layer.init_state(BATCH))
    found = [y]
    for t in range(first, SEQ):
        y, state = call(params, x[:, t : t + 1], state=state)
        found.append(y)
    assert_agrees(jnp.concatenate(found, axis=1), whole, name, 1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        assert_agrees(a, b, name, 1e-5)


def with_params(name, params, **options):
    """The layer of NNX that has ``params``."""
    case = CASES[name]
    make = partial(
        getattr(nnx_layers, case.name), FEATURES, HEADS, **case.options, **options
    )
    layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    nnx.update(layer, params)
    return layer


@pytest.mark.sample(2)
@EVERY
def test_both_apis_have_the_same_parameters(name):
    case = CASES[name]
    description, params, x = drawn(name)
    shapes = {key: y.shape for key, y in description.parameters().items()}
    narrow = with_params(name, params)
    own = nnx.to_pure_dict(nnx.state(narrow, nnx.Param))
    assert {key: y.shape for key, y in own.items()} == shapes
    linen_layer = getattr(linen_layers, case.name)(HEADS, **case.options)
    made = jax.eval_shape(linen_layer.init, jax.random.key(0), x)["params"]
    assert {key: y.shape for key, y in made.items()} == shapes
    assert linen_layer.description(FEATURES) == narrow.description == description
    assert linen_layer.spec == narrow.spec == description.spec
    assert sa.parse(repr(description.spec)) == description.spec


@ONE
def test_both_apis_decode_as_the_description(name):
    case = CASES[name]
    description, params, x = drawn(name)
    other = getattr(linen_layers, case.name)(HEADS, **case.options)
    states = [each.init_state(BATCH) for each in (description, with_params(name, {}))]
    states.append(other.init_state(BATCH, FEATURES))

    @jax.jit
    def step(params, states, x):
        y, a = description(params, x[:, None], state=states[0], return_state=True)
        b, of_nnx = with_params(name, params).step(states[1], x)
        variables = {"params": params}
        c, of_linen = other.apply(variables, states[2], x, method="step")
        return (y[:, 0], of_nnx, of_linen), (a, b, c)

    for t in range(2):
        found, states = step(params, states, x[:, t])
        for y in (*found[1:], *(x for s in states[1:] for x in jax.tree.leaves(s))):
            assert np.isfinite(y).all()
        for y in found:
            assert_agrees(y, full_pass(name)[0][:, t], name, 1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gated_delta", "light_net"])
def test_documents_do_not_mix(name):
    case = CASES[name]
    spec_map = sa.causal() & sa.segments()
    describe = getattr(nnx_layers, case.name).describe
    layer = describe(FEATURES, HEADS, **case.options, map=spec_map)
    _, params, x = drawn(name)
    x = x[:, :12]
    ids = np.array([[4] * 3 + [7] * 9, [1] * 6 + [0] * 2 + [5] * 4])
    call = jax.jit(partial(layer, return_state=True, running=SMALL))
    wanted = oracle.layer(case.loop, params, x, ids)
    # In two calls, cut inside a document of one row and at a border of the other.
    state, found = layer.init_state(BATCH), []
    for piece in (slice(0, 6), slice(6, 12)):
        part = x[:, piece], jnp.asarray(ids[:, piece])
        y, state = call(params, part[0], segment_ids=part[1], state=state)
        found.append(y)
    assert_agrees(jnp.concatenate(found, axis=1), wanted, name, 1e-5)


def test_light_net_reads_both_ways():
    """The map ``full()``: a softmax over all tokens for each channel of the keys."""
    _, params, x = drawn("light_net")
    describe = nnx_layers.LightNet.describe
    both = describe(FEATURES, HEADS, gate_rank=3, map=sa.full())
    p = {key: np.asarray(y, np.float64) for key, y in params.items()}
    wide = np.asarray(x, np.float64)
    q, k, v = (np.tensordot(wide, p[y], 1) for y in ("query", "key", "value"))
    share = np.exp(k) / np.exp(k).sum(axis=1, keepdims=True)
    out = np.einsum("bqhd,bkhd,bkhe->bqhe", oracle.silu(q), share, v) * 4**-0.5
    flat = out.reshape(BATCH, SEQ, -1)
    flat = oracle.normed(flat, p["norm"].reshape(-1), 1e-5)
    flat = flat * oracle.silu(oracle.mapped(p, "gate", wide)).reshape(flat.shape)
    wanted = flat @ p["out"].reshape(-1, FEATURES)
    assert_agrees(jax.jit(both)(params, x), wanted, "both ways", 1e-5)
    with pytest.raises(ValueError, match=r"is not causal"):
        both.init_state(1)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "tpu", "triton"])
def test_other_backends(impl):
    """The options of a layer reach the kernels."""
    _, params, x = drawn("kimi")
    interpreted = impl in ("tpu", "triton")
    layer = with_params("kimi", params, impl=impl, interpret=interpreted)
    y = nnx.jit(lambda m, x: m(x))(layer, x)
    assert_agrees(y, full_pass("kimi")[0], impl, 1e-5)
    other = linen_layers.KimiDelta(HEADS, impl=impl, interpret=interpreted)
    running = other.bind({"params": params})
    assert (running.impl, running.interpret) == (impl, interpreted)


@pytest.mark.slow
def test_bfloat16():
    _, params, x = drawn("kimi")
    narrow = with_params("kimi", params, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    y, state = nnx.jit(lambda m, x: m(x, return_state=True))(narrow, x)
    assert y.dtype == state.conv.dtype == jnp.bfloat16
    assert state.inner.s.dtype == jnp.float32
    wanted = np.asarray(full_pass("kimi")[0], np.float64)
    error = np.linalg.norm(np.asarray(y, np.float64) - wanted)
    assert error < 0.03 * np.linalg.norm(wanted)
    assert narrow.init_state(2).conv.dtype == jnp.bfloat16


@pytest.mark.slow
@EVERY
def test_parameters_start_well(name):
    """Outputs have a scale of about 1, and a state lasts."""
    case = CASES[name]
    layer = getattr(nnx_layers, case.name)(64, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 40, 64))
    y = layer(x)
    assert 0.02 < float(jnp.std(y)) < 5
    for gate in layer.description.gates:
        params = {k: v[...] for k, v in vars(layer).items() if isinstance(v, nnx.Param)}
        for key, operand in gate.operands(params, x).items():
            assert key != "g" or -3 < float(jnp.mean(operand)) < 0


@pytest.mark.parametrize("name", sorted({case.name for case in CASES.values()}))
def test_fields_of_linen_are_the_options_of_the_description(name):
    cls = getattr(linen_layers, name)
    wanted = dict(inspect.signature(cls.describe).parameters)
    del wanted["features"], wanted["num_heads"]
    found = {f.name: f for f in fields(cls) if f.name not in linear_linen.NOT_OPTIONS}
    assert found.keys() == wanted.keys()
    for key, parameter in wanted.items():
        assert found[key].default == parameter.default, key


def test_what_layers_refuse():
    models = linear_models
    with pytest.raises(ValueError, match=r"features=9 must be a multiple of num_heads"):
        models.delta_net(9, 2)
    with pytest.raises(ValueError, match=r"num_v_heads=3 must be a multiple of"):
        models.gated_delta_net(8, 2, num_v_heads=3)
    with pytest.raises(ValueError, match=r"conv=0 must be at least 1"):
        models.kimi_delta(8, 2, conv=0)
    with pytest.raises(ValueError, match=r"head_dim=-1 must be at least 1"):
        models.light_net(8, 2, head_dim=-1)
    with pytest.raises(ValueError, match=r"feature_map='phi' must be a function"):
        models.linear_attention(8, 2, feature_map="phi")
    with pytest.raises(ValueError, match=r"must be causal|decay"):
        models.gated_delta_net(8, 2, map=sa.full())


def test_states_of_other_layers_are_refused():
    layer, params, x = drawn("delta")
    other = linear_models.linear_attention(FEATURES, HEADS).init_state(BATCH)
    call = lambda **more: jax.eval_shape(partial(layer, **more), params, x)
    for state in (other, layer.init_state(BATCH + 1)):
        with pytest.raises(ValueError, match=r"holds (no )?inputs.* of a convolution"):
            call(state=state)
    wrong = layer.init_state(BATCH)._replace(inner=layer.init_state(3).inner)
    with pytest.raises(ValueError, match=r"the state has shape"):
        call(state=wrong)
    with pytest.raises(ValueError, match=r"segment"):
        call(segment_ids=jnp.zeros((BATCH, SEQ), jnp.int32))
