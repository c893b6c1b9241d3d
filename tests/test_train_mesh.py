"""The training example on several devices and processes, some of which are killed.

Whole runs of several processes are slow: ``make test-slow``, or
``python -m pytest -m slow tests/test_train_mesh.py``.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm.checkpoints import Checkpoints, History, load_model
from lm.data import Corpus
from lm.mesh import ONE_DEVICE, check_lengths, devices_for, fitted, read_sizes
from lm.model import ModelConfig, routing_for
from lm.training import TrainConfig, compile_run, first_state, identity, train
from train_runs import DIES, EXAMPLES, SPEC, losses, metrics, record, run, write_texts

import sadsl as sa

# --- the text of a mesh ---


@pytest.mark.parametrize(
    ("text", "devices", "batch", "sequence"),
    [
        ("batch=2,sequence=4", 8, 2, 4),
        ("sequence=4, batch=2", 8, 2, 4),
        ("batch=-1", 8, 8, 1),
        ("sequence=-1", 3, 1, 3),
        ("batch=2,sequence=-1", 8, 2, 4),
        ("batch=-1,sequence=4", 4, 1, 4),
        ("batch=1", 1, 1, 1),
    ],
)
def test_a_mesh_has_all_devices(text, devices, batch, sequence):
    sizes = fitted(text, devices)
    assert sizes == {"batch": batch, "sequence": sequence}
    assert list(sizes) == ["batch", "sequence"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an axis with its size: write, for example, --mesh=batch=2"),
        ("batch", "'batch' is not an axis with its size"),
        ("batch=2;sequence=4", "is not an axis with its size"),
        ("batch=2,", "'' is not an axis with its size"),
        ("batch=two", "'batch=two' is not an axis with its size"),
        ("batch=2,tokens=4", "no axis 'tokens': the axes are 'batch', .* 'sequence'"),
        ("batch=2,batch=4", "the axis 'batch' occurs twice"),
        ("batch=0", "the size of 'batch' must be at least 1, or -1"),
        ("batch=-2", "the size of 'batch' must be at least 1, or -1"),
        ("batch=-1,sequence=-1", "only one size can be -1"),
    ],
)
def test_a_wrong_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=rf"--mesh={re.escape(repr(text))}.*{message}"):
        read_sizes(text)


def test_a_mesh_of_other_devices_is_refused():
    with pytest.raises(ValueError, match=r"has 8 devices, and there are 4.*devices=8"):
        fitted("batch=2,sequence=4", 4)
    with pytest.raises(ValueError, match=r"8 devices do not divide by 3"):
        fitted("batch=-1,sequence=3", 8)


def test_lengths_that_do_not_divide_are_refused():
    sizes = {"batch": 2, "sequence": 4}
    check_lengths(sizes, batch_size=6, accumulate=3, seq_len=48)
    with pytest.raises(ValueError, match=r"--batch_size=3 has 3 .*take --batch_size=4"):
        check_lengths(sizes, batch_size=3, accumulate=1, seq_len=48)
    with pytest.raises(
        ValueError, match=r"--batch_size=6 in --accumulate=2 parts has 3.*batch_size=8"
    ):
        check_lengths(sizes, batch_size=6, accumulate=2, seq_len=48)
    with pytest.raises(ValueError, match=r"--seq_len=50 does not .*take --seq_len=52"):
        check_lengths(sizes, batch_size=2, accumulate=1, seq_len=50)


# --- several devices of one process ---

SIZES = ModelConfig(
    num_layers=1, num_heads=2, num_kv_heads=2, d_model=8, d_hidden=12,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=4, batch_size=4, seq_len=16, learning_rate=0.01, warmup_steps=1,
    weight_decay=0.1, clip_norm=1.0, seed=0, valid_batches=2, valid_every=2,
    checkpoint_every=2,
)  # fmt: skip
BYTES = np.random.default_rng(0).integers(0, 256, 600).astype(np.uint8)
CORPUS = Corpus("bytes", BYTES[:500], BYTES[500:])


@pytest.fixture
def standard():
    """Flax's norms and optax's AdamW need what the tests forbid elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def on_mesh(text, config):
    lengths = config.batch_size, config.accumulate, config.seq_len
    return devices_for(text, *lengths)


def trained(compiled, config, state=None, history=None, keep=lambda *_: None):
    history = history or History()
    if state is None:  # a step takes the state away
        state = jax.tree.map(jnp.copy, compiled.state)
    train(compiled, state, history, config, CORPUS, keep, lambda history: None)
    return history


def check_equal(one, other):
    for name in ("train", "valid", "grad_norm"):
        found, wanted = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6)


CASES = {
    "window": (sa.parse("causal() & (window(4) | sinks(1))"), {}, {}),
    "parts": (sa.causal(), {}, {"batch_size": 8, "accumulate": 2}),
    "dropout": (sa.causal() & sa.window(5), {"dropout_rate": 0.5}, {}),
    "chosen": (sa.parse("causal() & topk(2, block=4, eligible=causal())"), {}, {}),
    "routing": (routing_for(16), {}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_several_devices_train_as_one(case, tmp_path, standard):
    """And a checkpoint of eight devices goes on on one, and the other way round."""
    spec, sizes, config = CASES[case]
    sizes = ModelConfig(**{**vars(SIZES), **sizes})
    config = TrainConfig(**{**vars(CONFIG), **config})
    one = compile_run(spec, sizes, config)
    eight = compile_run(spec, sizes, config, on_mesh("batch=2,sequence=4", config))
    assert one.devices is ONE_DEVICE
    assert eight.devices.mesh.size == 8
    for leaf in jax.tree.leaves(eight.state):
        assert len(leaf.sharding.device_set) == 8
    wanted = trained(one, config)
    name = identity(spec, sizes, config, CORPUS)
    for first, second, folder in ((eight, one, "a"), (one, eight, "b")):
        with Checkpoints(tmp_path / folder, name) as kept:

            def keep(state, history, kept=kept):
                if history.step == 2:
                    kept.save(state, history)

            check_equal(trained(first, config, keep=keep), wanted)
            state, history = kept.restore(second.state)
            assert history.step == 2
            check_equal(trained(second, config, state, history), wanted)
    assert load_model(tmp_path / "a")[0] == spec


def test_a_batch_is_split_and_parameters_are_copied():
    devices = on_mesh("batch=4,sequence=2", CONFIG)
    batch = np.arange(4 * 17, dtype=np.uint8).reshape(4, 17)
    split = devices.split(batch)
    assert {x.data.shape for x in split.addressable_shards} == {(1, 17)}
    np.testing.assert_array_equal(split, batch)
    key = jax.random.split(jax.random.key(3), 2)
    copied = devices.copied({"w": np.ones((3, 5), np.float32), "key": key})
    assert {x.data.shape for x in copied["w"].addressable_shards} == {(3, 5)}
    assert copied["key"].dtype == key.dtype
    assert copied["key"].is_fully_replicated
    assert (jax.random.key_data(copied["key"]) == jax.random.key_data(key)).all()


def test_attention_sends_what_its_spec_asks_for(standard):
    """The layers of a compiled model have the axes of the mesh."""
    devices = on_mesh("batch=2,sequence=4", CONFIG)
    graph, state = first_state(SPEC, SIZES, CONFIG, devices)
    layer = nnx.merge(graph, state.params, state.others).blocks[0].attention
    assert layer.mesh_axes == sa.MeshAxes(
        devices.mesh, batch="batch", sequence="sequence"
    )
    assert ONE_DEVICE.axes is None


# --- several processes ---

BETWEEN, WRITING = "between checkpoints", "while a checkpoint is written"
# The script, in which one process of the first start kills itself: when step 23 is
# done, or while all of them write the second checkpoint.
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import train_lm
from absl import app
from orbax.checkpoint import JsonCheckpointHandler

def kill():
    if place == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)

place = int(os.environ["LAUNCH_RANK"]), int(os.environ["LAUNCH_PROCESSES"])

{DIES}
if WHERE == {BETWEEN!r}:
    train_lm.Metrics = Metrics
else:
    JsonCheckpointHandler.async_save = async_save
app.run(train_lm.main)
"""
# Two seconds are enough on an idle machine, and machines are not always idle.
HEARTBEAT = 5


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    """The folder of a run of one process on one device."""
    out = tmp_path_factory.mktemp("alone")
    done = run(texts, out, batch_size=4)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def check_as_alone(out, alone):
    """Losses, metrics and pictures of a run are those of one process."""
    for found, wanted in zip(losses(out), losses(alone), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    for name in ("dense", "sparse"):
        lines = metrics(out, name)
        assert [line["step"] for line in lines] == list(range(1, 41))
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                [x[key] for x in lines], [x[key] for x in metrics(alone, name)],
                rtol=1e-3,
            )  # fmt: skip
    for name in ("loss.png", "steps.png", "pattern.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_eight_devices_of_one_process_train_as_one(texts, alone, tmp_path):
    """The command of the docstring, with a checkpoint read by one device."""
    mesh = {"mesh": "batch=2,sequence=4", "devices": 8, "batch_size": 4}
    done = run(texts, tmp_path, **mesh)
    assert done.returncode == 0, done.stdout + done.stderr
    check_as_alone(tmp_path, alone)
    assert record(tmp_path)["setting"]["mesh"] == "batch=2,sequence=4"
    spec, sizes, _ = load_model(tmp_path / "checkpoints" / "sparse")
    assert (repr(spec), sizes.d_model) == (SPEC, 16)


def lost_lines(done):
    return [x for x in done.stdout.splitlines() if "[launch] lost process" in x]


def check_survivors(done, survivors):
    """They ended of themselves, in time, and none as if nothing had happened."""
    ends = re.findall(r"process (\d+) ended after ([\d.]+) s: (.*)", done.stdout)
    assert sorted(int(rank) for rank, _, _ in ends) == survivors, done.stdout
    for _, seconds, how in ends:
        assert float(seconds) < HEARTBEAT + 30
        assert how != "exit status 0"
    assert "there is no end of" not in done.stdout


def run_killed(texts, out, launcher, victim, where=BETWEEN, **flags):
    """A run in which the process ``victim``, a rank and of how many, kills itself."""
    program = "-c", f"VICTIM, WHERE = {victim!r}, {where!r}\n{KILLED}"
    launcher = *launcher, f"--heartbeat_timeout={HEARTBEAT}"
    return run(texts, out, program=program, launcher=launcher, batch_size=4, **flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "victim", "after", "mesh", "where"),
    [
        pytest.param(2, 2, 1, 1, "batch=-1,sequence=2", BETWEEN, id="two"),
        pytest.param(4, 1, 2, 2, "batch=-1", BETWEEN, id="four"),
        pytest.param(2, 1, 0, 1, "batch=-1", BETWEEN, id="coordinator"),
        pytest.param(4, 1, 0, 2, "sequence=-1", WRITING, id="coordinator of four"),
        pytest.param(2, 1, 1, 1, "batch=-1", WRITING, id="two that write"),
    ],
)
def test_a_killed_process_is_named_and_the_rest_goes_on(
    processes, devices, victim, after, mesh, where, texts, alone, tmp_path
):
    """The last checkpoint is that of step 16, which all processes wrote."""
    launcher = (
        f"--processes={processes}", f"--devices_each={devices}", "--restarts=1",
        f"--processes_after_loss={after}",
    )  # fmt: skip
    done = run_killed(texts, tmp_path, launcher, (victim, processes), where, mesh=mesh)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lost_lines(done)
    assert re.search(rf"lost process {victim} \(pid \d+\): killed by SIGKILL; ", line)
    check_survivors(done, [i for i in range(processes) if i != victim])
    assert f"restart 1 of 1 with {after} processes" in done.stdout
    assert "[0]   going on from step 16 of 40" in done.stdout
    check_as_alone(tmp_path, alone)
    assert record(tmp_path)["setting"]["processes"] == after


@pytest.mark.slow
def test_without_a_restart_the_launcher_fails(texts, tmp_path):
    """And the same command goes on with another number of processes."""
    done = run_killed(texts, tmp_path, ("--processes=2", "--devices_each=1"), (1, 2))
    assert done.returncode == 128 + 9, done.stdout + done.stderr
    assert len(lost_lines(done)) == 1
    check_survivors(done, [0])
    assert [x["step"] for x in metrics(tmp_path, "dense")] == list(range(1, 24))


def with_specs(texts, out, *specs):
    """A run of two processes, each with a spec of its own; what they said."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(EXAMPLES)!r}); "
        f"sys.argv.append('--spec=' + {specs!r}[int(os.environ['LAUNCH_RANK'])]); "
        "import train_lm; train_lm.app.run(train_lm.main)"
    )
    launcher = "--processes=2", "--devices_each=1", "--restarts=1"
    done = run(texts, out, program=("-c", code), launcher=launcher, batch_size=4)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "[launch] status 2 says that the command was refused" in done.stdout
    assert not (out / "checkpoints").exists()
    lines = done.stdout.splitlines()
    return [" ".join(x[3:] for x in lines if x[:3] == f"[{i}]") for i in range(2)]


@pytest.mark.slow
def test_processes_with_different_flags_are_refused(texts, tmp_path):
    found = with_specs(texts, tmp_path, "causal() & window(7)", "causal() & window(9)")
    for said in map(str.split, found):
        said = " ".join(said)
        assert "error: the processes of this computation disagree" in said
        assert "'causal() & window(7)'] in process 0" in said
        assert "'causal() & window(9)'] in process 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_a_mistake_of_one_process_ends_all(bad, texts, tmp_path):
    specs = ["causal()", "causal()"]
    specs[bad] = "causl()"
    found = with_specs(texts, tmp_path, *specs)
    assert "error: at position 0, the spec has the unknown name 'causl'" in found[bad]
    assert "error: at" not in found[1 - bad]
