"""The training example at tiny sizes: its files; a killed run loses nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import train_lm
from lm import data
from lm.checkpoints import Checkpoints, History

SCRIPT = Path(__file__).parent.parent / "examples" / "train_lm.py"
SPEC = "causal() & (window(8) | sinks(2))"
TINY = {
    "steps": 60, "seq_len": 48, "batch_size": 2, "num_layers": 1, "num_heads": 2,
    "d_model": 16, "valid_batches": 2, "valid_every": 20, "checkpoint_every": 4,
    "learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of files, one of them with bytes that are no text."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["while", "return", "yield", "lambda"], 60)
        (folder / f"{i}.txt").write_text(" ".join(words))
    (folder / "deep").mkdir()
    (folder / "deep" / "noise.bin").write_bytes(rng.bytes(200))
    (folder / "empty").write_bytes(b"")
    return folder


def command(texts, out, *more, **changes):
    flags = {"data": texts, "out": out, "spec": SPEC, **TINY, **changes}
    return [
        sys.executable, str(SCRIPT), *(f"--{k}={v}" for k, v in flags.items()), *more
    ]  # fmt: skip


def run(*args, **changes):
    return subprocess.run(
        command(*args, **changes),
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A run that nothing interrupted: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    done = run(texts, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def losses(out):
    record = json.loads((out / "train_lm.json").read_text())
    return [run["history"]["train"] for run in record["runs"]]


def test_a_run_writes_its_table_and_pictures(finished):
    out, printed = finished
    record = json.loads((out / "train_lm.json").read_text())
    dense, sparse = record["rows"]
    assert (dense["spec"], sparse["spec"]) == ("causal()", SPEC)
    assert dense["num_pairs"] == 48 * 49 // 2 > sparse["num_pairs"]
    assert record["runs"][0]["num_params"] == record["runs"][1]["num_params"]
    for name in ("loss.png", "pattern.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "train_lm.md").read_text()
    assert len({len(line) for line in text.splitlines()[:4]}) == 1
    assert "validation bits/byte" in printed
    assert not list(out.glob(".*.part"))


def test_both_models_start_alike_and_learn(finished):
    dense, sparse = losses(finished[0])
    assert len(dense) == len(sparse) == TINY["steps"]
    assert dense[0] == sparse[0] == pytest.approx(8.0, abs=1e-5)
    assert np.mean(dense[-5:]) < 5
    assert np.mean(sparse[-5:]) < 5


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(texts, finished, tmp_path):
    process = subprocess.Popen(
        command(texts, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder, deadline = tmp_path / "checkpoints" / "dense", time.monotonic() + 120
    while not any(path.name.isdigit() for path in folder.glob("*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "train_lm.json").exists()
    again = run(texts, tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on from step" in again.stdout
    np.testing.assert_allclose(losses(tmp_path), losses(finished[0]), rtol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(texts, finished):
    out, _ = finished
    other = run(texts, out, d_model=32, spec="causal() & window(4)")
    assert other.returncode == 2
    assert "Traceback" not in other.stderr
    said = " ".join(other.stdout.split())
    assert "are of another run" in said
    assert "d_model: 16 there, 32 here" in said
    assert str(out / "checkpoints" / "dense") in said.replace(" ", "")
    assert "--fresh" in said


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


@pytest.mark.slow
def test_what_content_decides_is_trained_by_name(texts, tmp_path):
    """Routing, with its centroids in the checkpoint, and blocks chosen by a query."""
    best = "causal() & topk(2, block=8, eligible=causal())"
    done = run(texts, tmp_path, f"--spec={best}", spec="routing", steps=6)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "train_lm.json").read_text())
    dense, *rows = record["rows"]
    assert [row["spec"] for row in rows] == ["routing", best]
    assert dense["num_pairs"]
    assert not any(row["num_pairs"] for row in rows)
    assert "by content" in (tmp_path / "train_lm.md").read_text()
    assert len({tuple(x) for x in losses(tmp_path)}) == 3


@pytest.mark.slow
def test_centroids_come_back_from_a_checkpoint(texts, tmp_path):
    for _ in range(2):
        done = run(texts, tmp_path, spec="routing", steps=8)
        assert done.returncode == 0, done.stdout + done.stderr
    last = tmp_path / "checkpoints" / "sparse"
    shutil.rmtree(last / "8")
    before = losses(tmp_path)
    done = run(texts, tmp_path, spec="routing", steps=8)
    assert "going on from step 4" in done.stdout
    assert losses(tmp_path) == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("causal() & windw(3)", "at position 11"),
        ("window(3, 3)", "sees a later key"),
        ("causal() & segments()", "reads the run-time arrays"),
        ("causal() & kmeans(4)", "reads the run-time arrays .'centroids'"),
        ("topk(4)", "sees a later key"),
        ("heads((causal(), 2))", "must be a map, softmax"),
    ],
)
def test_a_bad_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        train_lm.read_spec(spec, 48, 2)


def test_files_are_split_the_same_way_each_time(texts):
    corpus, again = (data.load(str(texts), 48) for _ in range(2))
    assert corpus.fingerprint == again.fingerprint
    assert len(corpus.train) > 10 * len(corpus.valid) > 0
    total = sum(len(f.read_bytes()) for f in texts.rglob("*") if f.is_file())
    # The files of each part are joined by one byte.
    assert len(corpus.train) + len(corpus.valid) == total + 31 - 2


def test_a_single_file_is_split_by_its_tail(tmp_path):
    file = tmp_path / "all.bin"
    content = np.random.default_rng(1).bytes(4000)
    file.write_bytes(content)
    corpus = data.load(str(file), 48)
    assert corpus.train.tobytes() + corpus.valid.tobytes() == content
    assert len(corpus.valid) == 200


def test_batches_are_functions_of_seed_and_step(texts):
    corpus = data.load(str(texts), 48)
    sizes = {"batch_size": 3, "seq_len": 48}
    one, same, other = (
        data.train_batch(corpus, seed=s, step=5, **sizes) for s in (0, 0, 1)
    )
    assert one.shape == (3, 49)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    windows = list(data.valid_batches(corpus, num_batches=2, **sizes))
    assert [w.shape for w in windows] == [(3, 49)] * 2


def test_data_that_is_missing_or_short_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file or folder"):
        data.load(str(tmp_path / "nowhere"), 48)
    with pytest.raises(ValueError, match=r"no file in this folder has a byte in it"):
        data.load(str(tmp_path), 48)
    file = tmp_path / "short.txt"
    file.write_text("")
    with pytest.raises(ValueError, match=r"the file is empty"):
        data.load(str(file), 48)
    file.write_text("short")
    with pytest.raises(
        ValueError, match=r"0 bytes.*seq_len \+ 1 = 49.*smaller --seq_len"
    ):
        data.load(str(file), 48)
    with pytest.raises(
        ValueError, match=r"cannot be split by file: name the file itself"
    ):
        data.load(str(tmp_path), 48)
