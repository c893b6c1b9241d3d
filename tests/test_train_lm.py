"""The training example at tiny sizes: its files; a killed run loses nothing."""

import shutil
import signal

import numpy as np
import pytest
import train_lm
from lm import data
from lm.checkpoints import load_model
from train_runs import (
    SPEC,
    TINY,
    losses,
    metrics,
    record,
    run,
    run_killed,
    write_texts,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


def killed(texts, out, where, last):
    """A run that was killed after the line ``last``: one checkpoint is left."""
    done = run_killed(texts, out, where)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert [line["step"] for line in metrics(out, "dense")] == list(range(1, last + 1))
    folder = out / "checkpoints" / "dense"
    assert [x.name for x in folder.iterdir() if x.name.isdigit()] == ["16"]


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A run that was killed and went on: its folder, and what it printed at last."""
    out = tmp_path_factory.mktemp("finished")
    killed(texts, out, "between checkpoints", last=23)
    done = run(texts, out, profile=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_a_run_writes_its_table_and_pictures(finished):
    out, printed = finished
    found = record(out)
    dense, sparse = found["rows"]
    assert (dense["spec"], sparse["spec"]) == ("causal()", SPEC)
    assert dense["num_pairs"] == 48 * 49 // 2 > sparse["num_pairs"]
    assert found["runs"][0]["num_params"] == found["runs"][1]["num_params"]
    for name in ("loss.png", "steps.png", "pattern.png"):
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


def check_went_on(out, printed):
    """The first run, which was killed, against the one that nothing disturbed."""
    assert "going on from step 16 of 40" in printed
    lines, whole = metrics(out, "dense"), metrics(out / "undisturbed", "dense")
    assert [line["step"] for line in lines] == list(range(1, 41))
    for key in ("step", "loss", "lr", "grad_norm", "valid_loss"):
        assert [x.get(key) for x in lines] == [x.get(key) for x in whole]
    assert [x["loss"] for x in lines] == losses(out)[0]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished):
    check_went_on(*finished)


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(texts, tmp_path):
    killed(texts, tmp_path, "while it writes a checkpoint", last=31)
    assert any("tmp" in x.name for x in (tmp_path / "checkpoints/dense").iterdir())
    again = run(texts, tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    check_went_on(tmp_path, again.stdout)
    assert not any("tmp" in x.name for x in (tmp_path / "checkpoints/dense").iterdir())


def test_a_profile_is_written_and_named(finished):
    """Two steps of each run, after the first that this process made."""
    out, printed = finished
    for name, steps in (("dense", "18 to 19"), ("sparse", "2 to 3")):
        folder = out / "profile" / name
        assert f"profile of steps {steps}: {folder}" in printed
        traces = [*folder.rglob("*.xplane.pb")]
        assert len(traces) == 1
        assert traces[0].stat().st_size


def test_metrics_say_what_each_step_did(finished):
    out, _ = finished
    lines = metrics(out, "sparse")
    names = ["step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"]
    for line in lines:
        validated = line["step"] in (20, 40)
        assert list(line) == names + ["valid_loss"] * validated
        speed = line["tokens_per_second"] * line["seconds"]
        assert speed == pytest.approx(TINY["batch_size"] * TINY["seq_len"])
    # Warm-up to the peak in a tenth of the steps, then down to a tenth of it.
    rates = [line["lr"] for line in lines]
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert rates[-1] == pytest.approx(0.001, rel=0.02)
    assert [x["loss"] for x in lines] == losses(out)[1]


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(texts, tmp_path):
    """The first rate of the warm-up is 0, the second one is far too large."""
    flags = {"learning_rate": 1e30, "checkpoint_every": 1, "clip_norm": 0.5}
    done = run(texts, tmp_path, **flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = " ".join(done.stdout.split())
    assert "stopped: dense: the parameter norm of step 2 is inf" in said
    newest = tmp_path / "checkpoints" / "dense" / "1"
    kept = f"The last good checkpoint is {newest}."
    assert kept.replace(" ", "") in said.replace(" ", "")  # lines are broken anywhere
    assert "a smaller --learning_rate (now 1e+30)" in said
    assert "or a smaller --clip_norm (now 0.5)" in said
    assert newest.is_dir()
    assert not newest.with_name("2").exists()
    assert [line["step"] for line in metrics(tmp_path, "dense")] == [1]


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


@pytest.mark.slow
def test_what_content_decides_is_trained_by_name(texts, tmp_path):
    """Routing, with its centroids in the checkpoint, and blocks chosen by a query."""
    best = "causal() & topk(2, block=8, eligible=causal())"
    done = run(texts, tmp_path, f"--spec={best}", spec="routing", steps=6)
    assert done.returncode == 0, done.stdout + done.stderr
    dense, *rows = record(tmp_path)["rows"]
    assert [row["spec"] for row in rows] == ["routing", best]
    assert dense["num_pairs"]
    assert not any(row["num_pairs"] for row in rows)
    assert "by content" in (tmp_path / "train_lm.md").read_text()
    assert len({tuple(x) for x in losses(tmp_path)}) == 3


@pytest.mark.slow
def test_the_flags_reach_the_run(texts, tmp_path):
    """Accumulation, dropout and bfloat16 in one command, and its model read back."""
    flags = {"accumulate": 2, "dropout_rate": 0.2, "dtype": "bfloat16", "steps": 6}
    done = run(texts, tmp_path, **flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = record(tmp_path)["setting"]
    assert {name: found[name] for name in flags} == flags
    spec, sizes, _ = load_model(tmp_path / "checkpoints" / "sparse")
    assert repr(spec) == SPEC
    assert (sizes.dtype, sizes.dropout_rate, sizes.d_model) == ("bfloat16", 0.2, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"profile": -1}, "flag --profile=-1"),
        ({"dtype": "float16"}, "flag --dtype=float16"),
        ({"accumulate": 3}, "error: --accumulate=3 must divide --batch_size=2"),
    ],
)
def test_wrong_flags_end_without_a_trace(flags, message, texts, tmp_path):
    done = run(texts, tmp_path, **flags)
    assert done.returncode in (1, 2)
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_centroids_come_back_from_a_checkpoint(texts, tmp_path):
    for _ in range(2):
        done = run(texts, tmp_path, spec="routing", steps=8, checkpoint_every=4)
        assert done.returncode == 0, done.stdout + done.stderr
    last = tmp_path / "checkpoints" / "sparse"
    shutil.rmtree(last / "8")
    before = losses(tmp_path)
    done = run(texts, tmp_path, spec="routing", steps=8, checkpoint_every=4)
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
