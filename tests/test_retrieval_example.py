"""The example of retrieval heads: its task, its plans, and that its claim holds."""

import itertools

import jax
import numpy as np
import pytest
import retrieval_heads
from retrieval_heads import MARK, NEEDLES, WORDS, Options
from rich.console import Console

import sadsl as sa

TINY = ["--steps=2", "--batch_size=4", "--seq_len=24", "--needle=3", "--num_layers=1",
        "--num_heads=2", "--d_model=16", "--prompts=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def settings():
    """Promotion as users of the example have it; programs run once: no optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_prompt_ends_in_its_needle():
    asked = Options(seq_len=40, needle=5)
    lengths = np.array([20, 30, 40] * 3)
    depths = np.repeat([0.0, 0.5, 1.0], 3)
    found = retrieval_heads.prompts(np.random.default_rng(0), asked, lengths, depths)
    following = {}
    rows = zip(*found, lengths, depths, strict=True)
    for tokens, start, answer, length, depth in rows:
        assert answer == length - 5
        needle = tokens[start : start + 5]
        np.testing.assert_array_equal(tokens[answer:length], needle)
        assert set(needle) <= set(NEEDLES)
        assert len(set(needle)) == 5
        assert np.flatnonzero(tokens == MARK).tolist() == [start - 1, answer - 1]
        assert start - 1 == int(depth * (answer - 7))
        for word, after in itertools.pairwise(tokens):
            if word < WORDS and after < WORDS:
                following.setdefault(word, set()).add(after)
    # At most two words follow a word, or the text would teach nothing at hand. Behind
    # a needle, the text goes on from the word that the needle hides.
    assert max(map(len, following.values())) <= 2
    np.testing.assert_array_equal(
        found.spans(5)[0], np.arange(found.answers[0], found.answers[0] + 5)
    )


def test_heads_that_are_taken_away_see_nothing():
    asked = Options(num_layers=2, num_heads=2)
    plan = retrieval_heads.without(asked, [(0, 1), (1, 0), (1, 1)])
    seen = [spec.dense(6, num_heads=2).any(axis=(1, 2)).tolist() for spec in plan]
    assert seen == [[True, False], [False, False]]
    every = retrieval_heads.without(asked, [])
    assert all((spec.dense(6, num_heads=2) == np.tri(6)).all() for spec in every)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "--steps=0 must be at least 1"),
        ("--seq_len=30", "--seq_len=30 must be at least 36"),
        ("--d_model=30", "d_model=30 must be a multiple of 2 * num_heads=8"),
    ],
)
def test_bad_options_are_said_without_a_trace(capsys, flag, message):
    assert retrieval_heads.main([flag]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_model_that_does_not_copy_is_refused(capsys):
    assert retrieval_heads.main(TINY) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "no answer has that share of its needle" in said


def test_tables_line_up():
    scores = np.array([[0.02, 0.91], [0.0, 0.1]])
    rows = [("all heads dense", 0, 1.0), ("without retrieval heads", 2, 0.043)]
    text = retrieval_heads.tables(retrieval_heads.Found(scores, (), rows))
    first, second = text.split("\n\n")
    for part in (first, second):
        assert len({len(line) for line in part.splitlines()}) == 1
    assert "layer 0      0.02    0.91" in first
    assert second.endswith("4.3%")


@pytest.mark.slow
def test_retrieval_heads_are_what_copies(tmp_path):
    """Taking them away destroys the copy; taking away as many others does not."""
    jax.config.update("jax_disable_most_optimizations", False)
    asked = retrieval_heads.options([f"--out={tmp_path}"])
    found = retrieval_heads.run(asked, Console())
    share = {name: copied for name, _, copied in found.rows}
    changed = {name: count for name, count, _ in found.rows}
    assert share["all heads dense"] > 0.9
    assert share["without retrieval heads"] < 0.15
    assert share["without other heads"] > 0.75
    assert changed["without other heads"] == changed["without retrieval heads"] < 4
    # The plan keeps them dense, which is what the copy needs.
    assert share["plan: others local"] > 0.75 > 0.4 > share["all heads local"]
    (path,) = tmp_path.iterdir()
    assert sa.read_head_plan(path) == found.plan
