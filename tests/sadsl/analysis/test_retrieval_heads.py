"""Retrieval heads: top keys against whole attention matrices, scores by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.analysis.retrieval_heads import (
    LayerInputs,
    NeedleRun,
    needle_scores,
    retrieval_plan,
    retrieval_scores,
    top_keys,
)
from sadsl.selections import topk

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


def arrays(n, batch=2, heads=4, kv_heads=2, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, h, dim) for h in (heads, kv_heads)]
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def whole(q, k, pairs):
    """The top key of every query, by all scores; ``pairs`` are of one or each batch."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bihd,bjhd->bhij", q, k)
    scores = np.where(pairs, scores, -np.inf)
    return np.where(np.isneginf(scores).all(-1), -1, scores.argmax(axis=-1))


MAPS = {
    "causal": sa.causal(),
    "empty rows": sa.causal() & sa.window(5) & sa.where(lambda q, k: q % 3 > 0),
    "per head": sa.per_head(sa.full(), sa.sinks(3), sa.window(2, 2), sa.strided(4)),
    "reads its length": sa.where(lambda q, k, h, n: k >= n - 5 - h),
}


@pytest.mark.parametrize("n", [1, 13, 37, 130])
@pytest.mark.parametrize("name", MAPS)
def test_top_keys_are_those_of_the_whole_matrix(name, n):
    q, k = arrays(n)
    wanted = whole(q, k, MAPS[name].dense(n, num_heads=4)[None])
    rows = sorted({0, n // 3, n - 1})
    for strip in (7, 4096):
        found = top_keys(LayerInputs(q, k, MAPS[name]), rows, strip=strip)
        np.testing.assert_array_equal(found, wanted[:, :, rows])


def test_documents_are_honoured():
    n = 37
    q, k = arrays(n)
    ids = np.stack([np.arange(n) // 10, np.arange(n) // 17])
    given = {"q_segment_ids": ids, "kv_segment_ids": ids}
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    wanted = whole(q, k, same & np.tri(n, dtype=bool))
    spec = sa.causal() & sa.segments()
    found = top_keys(LayerInputs(q, k, spec, given), range(n), strip=8)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_choices_are_honoured():
    n = 37
    q, k = arrays(n)
    spec = sa.causal() & topk(1, block=8, block_q=1, eligible=sa.causal())
    chosen = sa.select(spec, q, k)
    chosen = {name: np.asarray(x) for name, x in chosen.items()}
    by_batch = ({name: x[b] for name, x in chosen.items()} for b in range(2))
    pairs = [spec.dense(n, num_heads=4, operands=given) for given in by_batch]
    found = top_keys(LayerInputs(q, k, spec), range(n), strip=8)
    np.testing.assert_array_equal(found, whole(q, k, np.stack(pairs)))


def test_ties_go_to_the_lower_key_also_across_strips():
    inputs = LayerInputs(jnp.ones((1, 9, 1, 2)), jnp.ones((1, 9, 1, 2)), sa.full())
    assert top_keys(inputs, [0, 8], strip=4).tolist() == [[[0, 0]]]


def test_nothing_of_the_size_of_all_pairs_is_made():
    """At this length a matrix of all pairs would take 64 GiB."""
    n = 131_072
    q = jnp.zeros((1, n, 1, 1)).at[0, n - 1].set(1.0)
    k = jnp.zeros((1, n, 1, 1)).at[0, 70_000].set(1.0)
    assert top_keys(LayerInputs(q, k), [n - 1]).tolist() == [[[70_000]]]


@pytest.mark.parametrize(
    ("spec", "rows", "strip", "error", "message"),
    [
        (sa.causal(), [13], 8, ValueError, r"rows=\[13\] must be positions of 13"),
        (sa.causal(), [-1], 8, ValueError, r"rows=\[-1\] must be positions"),
        (sa.causal(), [1], 0, ValueError, "strip=0 must be at least 1"),
        (sa.causal() & sa.segments(), [1], 8, ValueError, "which was not given"),
        (sa.linear(), [1], 8, NotImplementedError, "softmax over a map without a bias"),
        (
            sa.softmax(sa.causal(), bias=sa.alibi()), [1], 8, NotImplementedError,
            "softmax over a map without a bias",
        ),
    ],
)  # fmt: skip
def test_what_has_no_top_key_is_refused(spec, rows, strip, error, message):
    with pytest.raises(error, match=message):
        top_keys(LayerInputs(*arrays(13), spec), rows, strip=strip)


# --- scores ---


def looking(targets, n, heads):
    """q and k so that head h at row i looks at ``targets[h][i]``, or at itself."""
    q, k = np.zeros((1, n, heads, n)), np.zeros((1, n, heads, n))
    for h in range(heads):
        k[0, :, h] = np.eye(n)
        for i in range(n):
            q[0, i, h, targets[h].get(i, i)] = 1
    return LayerInputs(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))


#         0  1  2  3  4  5  6  7  8  9
TOKENS = [5, 7, 8, 9, 5, 1, 7, 8, 9, 8]
NEEDLE, ANSWER = (1, 4), 6


def run(*layers, tokens=TOKENS):
    return NeedleRun(np.array(tokens), NEEDLE, ANSWER, layers)


def test_scores_by_hand():
    """Rows 5 to 8 generate tokens 7, 8, 9 and 8."""
    copies = {5: 1, 6: 2, 7: 3, 8: 2}  # one position twice counts twice
    partly = {5: 1, 6: 3}  # row 6 looks at 9, and 8 is generated
    outside = {8: 7}  # the right token, but not in the needle
    one = looking([copies, partly], 10, 2)
    two = looking([outside, {}], 10, 2)
    wanted = [[4 / 3, 1 / 3], [0, 0]]
    np.testing.assert_allclose(needle_scores(run(one, two)), wanted)
    plan = retrieval_plan(needle_scores(run(one, two)), sa.window(2, 0), threshold=0.5)
    assert plan == (sa.per_head(sa.causal(), sa.window(2, 0)), sa.window(2, 0))
    every = retrieval_plan(np.ones((1, 2)), sa.window(2, 0))
    assert every == (sa.causal(),)
    # A plan is text, and reads back.
    assert sa.read_head_plan(sa.write_head_plan(plan)) == plan


def test_only_runs_with_a_good_answer_count():
    one = looking([{5: 1, 6: 2, 7: 3, 8: 2}], 10, 1)
    good = run(one)
    assert good.recall == 1.0
    bad = run(one, tokens=[5, 7, 8, 9, 5, 1, 0, 0, 9, 0])
    assert bad.recall == pytest.approx(1 / 3)
    np.testing.assert_allclose(retrieval_scores([good, bad]), [[4 / 3]])
    half = (4 / 3 + 1 / 3) / 2
    np.testing.assert_allclose(
        retrieval_scores([good, bad], least_recall=0.3), [[half]]
    )
    with pytest.raises(ValueError, match=r"least_recall=0.5: no answer has that share"):
        retrieval_scores([bad])


@pytest.mark.parametrize(
    ("needle", "answer"), [((3, 3), 6), ((-1, 2), 6), ((1, 8), 6), ((1, 4), 10)]
)
def test_a_run_that_makes_no_sense_is_refused(needle, answer):
    with pytest.raises(
        ValueError, match=r"the needle must be a span before the answer"
    ):
        NeedleRun(np.array(TOKENS), needle, answer, ())
