"""Checkpoints of the training example: whole, checked, and read as models."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm.checkpoints import Checkpoints, History, load_model
from lm.data import Corpus
from lm.finite import NotFinite
from lm.model import LanguageModel, ModelConfig, routing_for
from lm.training import State, TrainConfig, compile_run, identity, train

import sadsl as sa

STATE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(3)}


def saved(folder, steps=2, identity=None):
    with Checkpoints(folder, identity or {"spec": "causal()", "d_model": 8}) as kept:
        for step in range(1, steps + 1):
            kept.save(STATE, History([8.0] * step, [0.1] * step, [[step, 7.5]]))
    return folder


def restored(folder, identity=None):
    with Checkpoints(folder, identity or {"spec": "causal()", "d_model": 8}) as kept:
        kept.check()
        return kept.restore(STATE)


def test_a_checkpoint_comes_back_whole(tmp_path):
    assert restored(tmp_path) is None
    state, history = restored(saved(tmp_path))
    assert history == History([8.0] * 2, [0.1] * 2, [[2, 7.5]])
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


def test_half_a_checkpoint_is_not_seen(tmp_path):
    saved(tmp_path, steps=1)
    part = tmp_path / "2.orbax-checkpoint-tmp"
    (part / "state").mkdir(parents=True)
    assert restored(tmp_path)[1].step == 1


@pytest.mark.parametrize("part", ["state", "run"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_checkpoint_is_named(tmp_path, part, damage):
    saved(tmp_path)
    for file in (tmp_path / "2" / part).rglob("*"):
        if file.is_file() and (content := file.read_bytes()):
            half = len(content) // 2
            cut, flipped = content[:half], bytes(b ^ 0x55 for b in content)
            file.write_bytes(cut if damage == "cut" else flipped)
    with pytest.raises(ValueError, match=r"2 is damaged .*--fresh") as error:
        restored(tmp_path)
    assert str(tmp_path / "2") in str(error.value)


def test_a_foreign_checkpoint_says_what_differs(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"another run:\n  d_model: 8 there, 9 here\n"):
        restored(tmp_path, {"spec": "causal()", "d_model": 9})


SIZES = ModelConfig(num_layers=1, num_heads=2, num_kv_heads=2, d_model=8, d_hidden=12)
CONFIG = TrainConfig(
    steps=6, batch_size=2, seq_len=16, learning_rate=0.01, warmup_steps=1,
    weight_decay=0.1, clip_norm=1.0, seed=0, valid_batches=1, valid_every=6,
    checkpoint_every=3,
)  # fmt: skip
BYTES = np.random.default_rng(0).integers(0, 256, 600).astype(np.uint8)
CORPUS = Corpus("bytes", BYTES[:500], BYTES[500:])
SPEC = sa.parse("causal() & (window(4) | sinks(1))")


def test_keys_and_counters_of_dropout_come_back(tmp_path):
    key = jax.random.key(7)
    state = {"key": jax.random.split(key, 3), "count": jnp.uint32(5)}
    with Checkpoints(tmp_path, {"spec": "causal()"}) as kept:
        kept.save(state, History([8.0], [0.1], [], [1.0]))
        found, _ = kept.restore(state)
    assert found["key"].dtype == key.dtype
    for mine, theirs in zip(found["key"], state["key"], strict=True):
        drawn = [jax.random.uniform(x, (9,)) for x in (mine, theirs)]
        np.testing.assert_array_equal(*drawn)
    assert found["count"] == 5


def test_numbers_that_are_not_finite_are_never_kept(tmp_path):
    with Checkpoints(tmp_path, {"spec": "causal()"}) as kept:
        kept.save({"w": np.ones(3)}, History([8.0]))
        with pytest.raises(NotFinite, match=r"state \['w'\] of step 2 holds numbers"):
            kept.save({"w": np.array([1.0, np.inf, 2.0])}, History([8.0] * 2))
        assert kept.newest == tmp_path / "1"


@pytest.mark.parametrize(
    ("spec", "sizes", "config", "line"),
    [
        ("causal() & window(4)", {}, {}, f"spec: {SPEC!r} there, causal() & window(4)"),
        (SPEC, {"dtype": "bfloat16"}, {}, "dtype: float32 there, bfloat16 here"),
        (SPEC, {"dropout_rate": 0.5}, {}, "dropout_rate: 0.0 there, 0.5 here"),
        (SPEC, {}, {"accumulate": 2}, "accumulate: 1 there, 2 here"),
        (SPEC, {}, {"learning_rate": 0.1}, "learning_rate: 0.01 there, 0.1 here"),
    ],
)
def test_a_checkpoint_of_another_spec_or_setting_says_which(
    spec, sizes, config, line, tmp_path
):
    with Checkpoints(tmp_path, identity(SPEC, SIZES, CONFIG, CORPUS)) as kept:
        kept.save(STATE, History([8.0]))
    spec = sa.parse(spec) if isinstance(spec, str) else spec
    mine = identity(spec, replace(SIZES, **sizes), replace(CONFIG, **config), CORPUS)
    with (
        Checkpoints(tmp_path, mine) as kept,
        pytest.raises(ValueError, match="of another run:") as error,
    ):
        kept.check()
    said = str(error.value).splitlines()
    assert said[1].startswith(f"  {line}")
    assert len(said) == 3  # nothing else differs


def numbers_like(x):
    """Numbers of a leaf that no initializer makes."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(x.size + 5)
    return np.arange(x.size, dtype=x.dtype).reshape(x.shape)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (SPEC, replace(SIZES, dropout_rate=0.25, num_kv_heads=1)),
        (routing_for(CONFIG.seq_len), replace(SIZES, dtype="bfloat16")),
    ],
)
def test_a_model_is_read_from_the_folder_of_its_run(spec, sizes, tmp_path):
    made = nnx.eval_shape(lambda: LanguageModel(sizes, spec, nnx.Rngs(0)))
    params, others = jax.tree.map(numbers_like, nnx.state(made, nnx.Param, ...))
    with Checkpoints(tmp_path, identity(spec, sizes, CONFIG, CORPUS)) as kept:
        kept.save(State(params, {"moments": np.ones(3)}, others), History([8.0]))
    part = tmp_path / "2.orbax-checkpoint-tmp-0"
    part.mkdir()
    found_spec, found_sizes, found = load_model(tmp_path)
    assert part.exists()  # the run may be about to finish it
    assert (found_spec, found_sizes) == (spec, sizes)
    model = nnx.eval_shape(lambda: LanguageModel(found_sizes, found_spec, nnx.Rngs(0)))
    nnx.update(model, found)
    pairs = [
        jax.tree.leaves(x) for x in (nnx.state(model), nnx.merge_state(params, others))
    ]
    for one, other in zip(*pairs, strict=True):
        assert one.dtype == other.dtype
        assert jnp.array_equal(one, other)


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "dense").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path, tmp_path / "dense"):
        with pytest.raises(ValueError, match=rf"no checkpoint in {folder}: name the"):
            load_model(folder)
    assert not (tmp_path / "nowhere").exists()
    saved(tmp_path / "dense")
    for file in (tmp_path / "dense" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"2 is damaged"):
        load_model(tmp_path / "dense")


@pytest.fixture
def standard():
    """Flax's norms and optax's AdamW need what the tests forbid elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dropout", "routing"])
def test_dropout_and_centroids_go_on_bitwise(case, tmp_path, standard):
    """Stopped after the checkpoint of step 3 and continued, or not stopped at all."""
    spec = routing_for(CONFIG.seq_len) if case == "routing" else SPEC
    sizes = replace(SIZES, dropout_rate=0.5 if case == "dropout" else 0.0)
    compiled = compile_run(spec, sizes, CONFIG)
    start = jax.tree.map(jnp.copy, compiled.state)
    whole, ends = History(), []
    with Checkpoints(tmp_path, identity(spec, sizes, CONFIG, CORPUS)) as kept:

        def keep(state, history):
            if history.step == 3:
                kept.save(state, history)
            else:
                ends.append(jax.tree.map(jnp.copy, state))

        train(compiled, start, whole, CONFIG, CORPUS, keep, lambda history: None)
        state, history = kept.restore(compiled.state)
        assert history.step == 3
        train(compiled, state, history, CONFIG, CORPUS, keep, lambda history: None)
    for field in ("train", "valid", "grad_norm"):
        assert getattr(history, field) == getattr(whole, field)
    moved = [
        not jnp.array_equal(x, y)
        for x, y in zip(
            *(jax.tree.leaves(x.others) for x in (ends[0], compiled.state)), strict=True
        )
    ]
    assert any(moved)  # centroids, or counters of dropout
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        assert jnp.array_equal(one, other)
