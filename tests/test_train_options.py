"""Options of training: accumulation, bfloat16, the NaN watch, flags that are wrong."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from lm.checkpoints import Checkpoints, History
from lm.data import Corpus
from lm.finite import NotFinite
from lm.model import LanguageModel, ModelConfig, bits_per_byte, routing_for
from lm.training import (
    Compiled,
    State,
    TrainConfig,
    accumulated,
    compile_run,
    train,
)

import sadsl as sa

SIZES = ModelConfig(num_layers=1, num_heads=2, num_kv_heads=2, d_model=8, d_hidden=12)
CONFIG = TrainConfig(
    steps=6, batch_size=4, seq_len=37, learning_rate=0.01, warmup_steps=1,
    weight_decay=0.1, clip_norm=1.0, seed=0, valid_batches=1, valid_every=3,
    checkpoint_every=1,
)  # fmt: skip
BYTES = np.random.default_rng(0).integers(0, 8, 900).astype(np.uint8)
CORPUS = Corpus("bytes", BYTES[:700], BYTES[700:])
SPEC = sa.parse("causal() & window(5)")


@pytest.fixture
def standard():
    """Flax's norms and optax's AdamW need what the tests forbid elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def trained(sizes, config):
    """The history of a run without checkpoints, its last state, and its program."""
    compiled, history, last = compile_run(SPEC, sizes, config), History(), []
    train(
        compiled, None, history, config, CORPUS,
        keep=lambda state, history: last.append(state), tell=lambda history: None,
    )  # fmt: skip
    return history, last[-1], compiled


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts):
    """A linear model in float32 against the whole batch in float64."""
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal(7), rng.standard_normal((6, 13, 7))

    def cost(w, seen, part):
        loss = jnp.mean((part @ w - 1) ** 2)
        return loss, (loss, seen + 1)

    batch = jnp.asarray(x.reshape(parts, -1, 13, 7), jnp.float32)
    descend = jax.grad(cost, has_aux=True)
    gradient, (loss, seen) = jax.jit(accumulated, static_argnums=0)(
        descend, jnp.asarray(w, jnp.float32), jnp.int32(0), batch
    )
    error = x @ w - 1
    np.testing.assert_allclose(loss, (error**2).mean(), rtol=1e-5)
    wanted = 2 * np.einsum("bn,bnd->d", error, x) / error.size
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert seen == parts


@pytest.mark.slow
def test_a_run_in_parts_is_that_of_the_whole_batch_in_less_memory(standard):
    # Steps of Adam that rounding does not turn around: no rate is near its peak.
    config = replace(CONFIG, learning_rate=1e-3)
    whole, _, large = trained(SIZES, config)
    parts, _, small = trained(SIZES, replace(config, accumulate=4))
    np.testing.assert_allclose(parts.train, whole.train, rtol=1e-5)
    np.testing.assert_allclose(parts.grad_norm, whole.grad_norm, rtol=1e-4)
    bits = [[x for _, x in history.valid] for history in (parts, whole)]
    np.testing.assert_allclose(*bits, rtol=1e-5)
    assert small.temp_bytes < large.temp_bytes


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [("float32", SPEC), ("bfloat16", SPEC), ("bfloat16", routing_for(37))],
)
def test_activations_have_the_dtype_and_the_rest_is_float32(dtype, spec, standard):
    sizes = replace(SIZES, dtype=dtype)
    model = nnx.eval_shape(lambda: LanguageModel(sizes, spec, nnx.Rngs(0)))
    graph, params, others = nnx.split(model, nnx.Param, ...)
    moments = jax.eval_shape(CONFIG.optimizer().init, params)
    tokens = jax.ShapeDtypeStruct((2, 38), jnp.int32)

    def passed(params, others, tokens):
        model = nnx.merge(graph, params, others, copy=True)
        x = model.embedded(tokens)
        block = model.blocks[0]
        inner = block.attention(block.attention_norm(x)), block.up(block.mlp_norm(x))
        return (x, *inner, block(x)), (model.logits(x), bits_per_byte(model, tokens))

    activations, exact = jax.eval_shape(passed, params, others, tokens)
    assert {x.dtype for x in activations} == {jnp.dtype(dtype)}
    floats = [
        x
        for x in jax.tree.leaves((exact, params, others, moments))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(standard):
    exact, _, _ = trained(SIZES, CONFIG)
    rounded, state, _ = trained(replace(SIZES, dtype="bfloat16"), CONFIG)
    assert exact.train != rounded.train
    np.testing.assert_allclose(rounded.train, exact.train, rtol=0.01)
    np.testing.assert_allclose(rounded.grad_norm, exact.grad_norm, rtol=0.1)
    arrays = jax.tree.leaves((state.params, state.optimizer))
    assert {x.dtype for x in arrays} == {jnp.dtype("float32"), jnp.dtype("int32")}


def line_fit(rate):
    """A program for ``train`` that fits a line, which a large rate makes diverge."""
    optimizer = optax.sgd(rate)

    def cost(w, batch):
        x = batch[:, :-1].astype(jnp.float32) - 3.5
        return jnp.mean((x @ w - 1) ** 2)

    @jax.jit
    def step(state, batch):
        loss, gradient = jax.value_and_grad(cost)(state.params, batch)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = optax.tree.norm(gradient), optax.tree.norm(params)
        return State(params, moments, state.others), jnp.stack([loss, *norms])

    def valid(w, others, batch):
        return cost(w, batch)

    w = jnp.zeros(CONFIG.seq_len)
    start = State(w, optimizer.init(w), ())
    return Compiled(step, jax.jit(valid), start, w.size, 0, 0)


@pytest.mark.parametrize(
    ("rate", "what", "last"),
    [
        (1e30, "the parameter norm of step 1 is inf", None),
        (1e18, "the loss of step 2 is inf", 1),
        (3e17, "the gradient norm of step 2 is inf", 1),
        (1e-3, None, 6),
    ],
)
def test_training_stops_at_the_first_number_that_is_not_finite(
    rate, what, last, tmp_path
):
    history = History()
    with Checkpoints(tmp_path, {"rate": rate}) as kept:

        def run():
            train(
                line_fit(rate), None, history, CONFIG, CORPUS,
                keep=kept.save, tell=lambda history: None,
            )  # fmt: skip

        if what is None:
            run()
        else:
            with pytest.raises(NotFinite, match=what):
                run()
        assert kept.newest == (None if last is None else tmp_path / str(last))
        assert history.step == (last or 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 0}, "--accumulate=0 must be at least 1"),
        ({"accumulate": 3}, "--accumulate=3 must divide --batch_size=4"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0 must be positive"),
        ({"learning_rate": np.nan}, "--learning_rate=nan must be positive"),
        ({"learning_rate": np.inf}, "--learning_rate=inf must be finite"),
        ({"clip_norm": -1.0}, "--clip_norm=-1.0 must be positive"),
        ({"weight_decay": -0.1}, "--weight_decay=-0.1 must be at least 0"),
        ({"seed": -1}, "--seed=-1 must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be at least 0 and less than 1"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SIZES, **change)


def test_routing_has_no_dropout():
    sizes = replace(SIZES, dropout_rate=0.5)
    with pytest.raises(ValueError, match="routing attention drops no weights"):
        nnx.eval_shape(lambda: LanguageModel(sizes, routing_for(37), nnx.Rngs(0)))
