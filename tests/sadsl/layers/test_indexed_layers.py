"""Layers with an indexer, of both Flax APIs, against NumPy in float64."""

from functools import cache, partial
from typing import Any, NamedTuple

import indexed_layer_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from vectors_of import assert_agrees

import sadsl as sa
from sadsl.catalog import models
from sadsl.layers import indexed_models
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers.indexed_models import EntryDims, LatentDims
from sadsl.selections import reused

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, FEATURES, HEADS, K = 2, 13, 8, 4, 5
INDEX = {"index_heads": 3, "index_dim": 6}
DIMS = {"dims": LatentDims(5, 7, 6, 4, 3)}


class Case(NamedTuple):
    """A layer: its spec, its options, its definition, and keys or blocks it chooses."""

    spec: Any
    options: dict[str, Any]
    k: int


def of_groups(**more):
    return {"num_kv_heads": 2, "head_dim": 4, "turned": 2, "index_dim": 6, **more}


CASES = {
    "deepseek_v32": Case(
        models.deepseek_v32(1, K)[0],
        INDEX | {"dims": LatentDims(5, 7, 6, 2, 3)},
        K,
    ),
    "glm_5": Case(models.glm_5(1, K)[0], INDEX | DIMS, K),
    "glm_5_next": Case(
        models.glm_5_next(4, 8, 4)[3], INDEX | {"dims": LatentDims(5, 7, 6, 0, 3)}, 8
    ),
    "hy_v4": Case(models.hy_v4(1, K)[0], INDEX | DIMS, K),
    "mistral_large_4": Case(
        models.mistral_large_4(1, K)[0], INDEX | {"dims": LatentDims(5, None, 6, 4, 3)},
        K,
    ),
    "minimax_m3": Case(models.minimax_m3(4, 2, 4)[3], of_groups(), 2),
    "deepseek_v4": Case(
        models.deepseek_v4((4,), 2, 5)[0],
        INDEX | {"k": 2, "near": 5, "dims": EntryDims(6, 4, 7, 2, 3)},
        2,
    ),
    "qwen4_exp": Case(models.qwen4_exp(4, 8, 4)[3], of_groups(index_heads=3), 8),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)
BOTH = pytest.mark.parametrize(
    "loss", ["dense", pytest.param("sparse", marks=pytest.mark.slow)]
)
# Of a test that compiles much, one case runs in `make test`.
ONE = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "hy_v4")) for x in CASES]
)


def described(name, **options):
    case = CASES[name]
    describe = getattr(indexed_models, name)
    # DeepSeek-V4 makes its spec from sizes.
    spec = {} if name == "deepseek_v4" else {"spec": case.spec}
    return describe(FEATURES, HEADS, **{**spec, **case.options, **options})


@cache
def drawn(name):
    """Random parameters and inputs of a case."""
    rng = np.random.default_rng(len(name))
    params = {
        key: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)
        for key, (shape, _) in described(name).parameters().items()
    }
    return params, jnp.asarray(rng.normal(size=(BATCH, SEQ, FEATURES)), jnp.float32)


def defined(name, params, x, loss):
    """The definition; in the dense warm-up it chooses all keys."""
    p = {key: np.asarray(y, np.float64) for key, y in params.items()}
    k = CASES[name].k if loss == "sparse" else 10 * SEQ
    return getattr(oracle, name)(p, np.asarray(x, np.float64), k)


def is_of_index(name):
    return name.startswith("index_")


def weighed(y):
    return np.cos(np.arange(y.size)).reshape(y.shape)


@cache
def run(name, loss):
    """The layer's output and loss, and the gradients of their sum."""
    params, x = drawn(name)
    layer = described(name)

    def total(params):
        out, _, of_indexer = layer(params, x, loss=loss)
        weight = weighed(out).astype(np.float32)
        return jnp.sum(out * weight) + of_indexer, (out, of_indexer)

    gradients, found = jax.jit(jax.grad(total, has_aux=True))(params)
    return *found, gradients


@BOTH
@ONE
def test_output_and_loss_are_those_of_the_definition(name, loss):
    out, of_indexer, _ = run(name, loss)
    params, x = drawn(name)
    wanted = defined(name, params, x, loss)
    assert_agrees(out, wanted.out, name, 1e-5)
    kl = oracle.divergence(wanted)
    assert float(of_indexer) == pytest.approx(kl, rel=1e-5, abs=1e-7)


@BOTH
@ONE
def test_gradients_are_those_of_the_definition(name, loss):
    """Along a random direction, by central differences in float64.

    The attention learns from its output only, and the indexer from its loss only: so
    each of the two sees the other's parameters as they are.
    """
    params, x = drawn(name)
    *_, gradients = run(name, loss)
    rng = np.random.default_rng(1)
    steps = {key: rng.normal(size=y.shape) for key, y in params.items()}
    still = defined(name, params, x, loss)
    for key, g in gradients.items():
        assert np.isfinite(g).all(), key
        assert np.any(g), key

    def slope(value, kept):
        def moved(by):
            at = {
                key: np.asarray(y, np.float64) + by * steps[key] * kept(key)
                for key, y in params.items()
            }
            return value(defined(name, at, x, loss))

        return (moved(1e-6) - moved(-1e-6)) / 2e-6

    wanted = slope(
        lambda y: np.sum(y.out * weighed(y.out)), lambda key: not is_of_index(key)
    ) + slope(lambda y: oracle.divergence(y, still.logits, still.sink), is_of_index)
    found = sum(np.sum(np.asarray(g) * steps[key]) for key, g in gradients.items())
    assert found == pytest.approx(wanted, rel=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [3, 0, 16])
def test_layers_of_deepseek_v4_without_an_index(ratio):
    """All entries, none, and entries that are longer than the text."""
    layer = described("deepseek_v4", ratio=ratio)
    rng = np.random.default_rng(ratio)
    params = {
        key: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)
        for key, (shape, _) in layer.parameters().items()
    }
    x = drawn("deepseek_v4")[1]

    @jax.jit
    def run(params):
        def total(params):
            out, _, of_indexer = layer(params, x, loss="sparse")
            return jnp.sum(out * weighed(out).astype(np.float32)), (out, of_indexer)

        return jax.grad(total, has_aux=True)(params)

    gradients, (out, of_indexer) = run(params)
    used = ratio if ratio < SEQ else 0
    wide = {key: np.asarray(y, np.float64) for key, y in params.items()}
    theta = 160000.0 if ratio else 10000.0
    wanted = oracle.deepseek_v4(wide, np.asarray(x, np.float64), 2, used, theta=theta)
    assert_agrees(out, wanted.out, f"ratio {ratio}", 1e-5)
    assert float(of_indexer) == 0
    for key, g in gradients.items():
        assert np.any(g) or (ratio == 16 and key.startswith("entry")), key


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", ["hy_v4", "glm_5_next", "deepseek_v4"])
def test_short_inputs(name, length):
    """Where there is no whole pool, nor an entry, nothing is chosen."""
    params, x = drawn(name)
    if name != "hy_v4":
        for loss in ("dense", "sparse"):
            found = described(name)(params, x[:, :length], loss=loss)
            assert float(found.loss) == 0
            assert np.isfinite(found.out).all()
    else:
        found = described(name)(params, x[:, :length], loss="sparse")
        wanted = defined(name, params, x[:, :length], "sparse")
        assert_agrees(found.out, wanted.out, name, 1e-5)


def with_params(name, params, **options):
    """The layer of NNX that has ``params``."""
    make = partial(nnx_layers.IndexedAttention, described(name), **options)
    layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    nnx.update(layer, params)
    return layer


@pytest.mark.sample(2)
@EVERY
def test_both_apis_have_the_parameters_of_the_description(name):
    params, x = drawn(name)
    shapes = {key: y.shape for key, y in params.items()}
    own = nnx.to_pure_dict(nnx.state(with_params(name, params), nnx.Param))
    assert {key: y.shape for key, y in own.items()} == shapes
    layer = linen_layers.IndexedAttention(described(name))
    made = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {key: y.shape for key, y in made.items()} == shapes
    assert layer.spec == with_params(name, params).spec == sa.parse(repr(layer.spec))


@pytest.mark.sample(1)
@EVERY
def test_both_apis_are_one_program(name):
    params, x = drawn(name)
    other = linen_layers.IndexedAttention(described(name))
    programs = [
        lambda params, x: described(name)(params, x, loss="dense"),
        lambda params, x: with_params(name, params).attend(x, loss="dense"),
        lambda params, x: other.apply(
            {"params": params}, x, loss="dense", method="attend"
        ),
    ]
    wanted, *found = (str(jax.make_jaxpr(program)(params, x)) for program in programs)
    assert found == [wanted, wanted]


@pytest.mark.slow
@EVERY
def test_the_plain_call_is_the_output(name):
    """Without lists: the planner takes bits at this size."""
    params, x = drawn(name)
    wanted = run(name, "sparse")[0]
    assert_agrees(
        nnx.jit(lambda m, x: m(x))(with_params(name, params), x), wanted, name
    )
    layer = linen_layers.IndexedAttention(described(name))
    assert_agrees(jax.jit(layer.apply)({"params": params}, x), wanted, name)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "tpu", "triton"])
@pytest.mark.parametrize("name", ["glm_5", "minimax_m3"])
def test_other_backends(name, impl):
    """The options of a layer reach the kernels."""
    params, x = drawn(name)
    interpreted = impl in ("tpu", "triton")
    layer = with_params(name, params, impl=impl, interpret=interpreted)
    found = nnx.jit(lambda m, x: m.attend(x, loss="sparse"))(layer, x)
    assert_agrees(found.out, run(name, "sparse")[0], impl, 1e-5)
    assert float(found.loss) == pytest.approx(float(run(name, "sparse")[1]), rel=1e-4)


@pytest.mark.slow
@EVERY
def test_bfloat16(name):
    params, x = drawn(name)
    narrow = with_params(name, params, dtype=jnp.bfloat16)
    found = nnx.jit(lambda m, x: m.attend(x, loss="dense"))(narrow, x)
    assert found.out.dtype == jnp.bfloat16
    assert found.loss.dtype == jnp.float32
    wanted = np.asarray(run(name, "dense")[0], np.float64)
    error = np.linalg.norm(np.asarray(found.out, np.float64) - wanted)
    assert error < 0.03 * np.linalg.norm(wanted)


@pytest.mark.slow
@EVERY
def test_parameters_start_well(name):
    """Outputs have a scale of about 1, and temperatures start at 1."""
    layer = nnx_layers.IndexedAttention(described(name), rngs=nnx.Rngs(0))
    y = layer(jax.random.normal(jax.random.key(1), (2, 40, FEATURES)))
    assert 0.02 < float(jnp.std(y)) < 5


def test_what_layers_refuse():
    layer = described("glm_5")
    with pytest.raises(ValueError, match=r"indexer=None makes no arrays for it"):
        indexed_models.IndexedLayer(layer.spec, 8, 8, layer.core)
    with pytest.raises(ValueError, match=r"must have one choice at most"):
        described("glm_5", spec=sa.causal() & sa.topk(2, block=4))
    choice = layer.choice
    params, x = drawn("glm_5")
    taking = described("glm_5", spec=sa.latent(sa.causal() & reused(choice)))
    with pytest.raises(
        ValueError, match=r"reuses topk.*which was not given: pass choi"
    ):
        jax.eval_shape(taking, params, x)
    lists = {choice.key("listed"): jnp.zeros((1, 1, SEQ + 1, K), jnp.int32)}
    with pytest.raises(ValueError, match=r"is for 14 queries, this layer has 13"):
        jax.eval_shape(partial(taking, choices=lists), params, x)
    with pytest.raises(ValueError, match=r"Rotary: channels=3 must be even"):
        described("minimax_m3", turned=3)
    wide = described("minimax_m3", turned=6)
    with pytest.raises(ValueError, match=r"x has 4 channels, but 6 turn"):
        jax.eval_shape(wide, drawn("minimax_m3")[0], drawn("minimax_m3")[1])
    unsaid = sa.topk(
        2, block=1, block_q=1, score=sa.dot("iq", "ik", "iw"), scope="shared"
    )
    open_ended = described("glm_5", spec=sa.latent(sa.causal() & unsaid))
    with pytest.raises(ValueError, match=r"has eligible=None"):
        jax.eval_shape(partial(open_ended, loss="dense"), params, x)
    with pytest.raises(ValueError, match=r"loss='sparce' must be one of"):
        layer(params, x, loss="sparce")
    with pytest.raises(ValueError, match=r"learns 'gates', one for each query"):
        described("glm_5", spec=sa.gated(sa.causal(), sa.causal() & sa.window(2)))
    with pytest.raises(ValueError, match=r"groups=3 must divide num_heads=4"):
        described("deepseek_v4", dims=EntryDims(6, 4, 7, 3, 3))
    pairs = sa.topk(
        2, block=1, block_q=4, score=sa.dot("iq", "ik", "iw"), scope="shared",
        eligible=sa.causal(),
    )  # fmt: skip
    by_four = described("glm_5", spec=sa.latent(sa.causal() & pairs))
    with pytest.raises(NotImplementedError, match=r"and block_q=1"):
        jax.eval_shape(partial(by_four, loss="dense"), params, x)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_both_forms_of_latents_run_in_bfloat16(form):
    """XLA:CPU refuses some products of bfloat16 whose result is wider."""
    rng = np.random.default_rng(0)
    q, kv, up = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((1, SEQ, 4, 10), (1, SEQ, 1, 9), (4, 9, 5))
    )

    def run(*arrays):
        q, kv, up = arrays
        spec = sa.latent(sa.causal(), form=form)
        return sa.attention(q, kv, kv, spec, operands={"kv_b": up})

    narrow = jax.jit(run)(q, kv, up)
    wide = jax.jit(run)(*(x.astype(jnp.float32) for x in (q, kv, up)))
    error = np.linalg.norm(np.asarray(narrow, np.float64) - wide)
    assert error < 0.02 * np.linalg.norm(wide)
