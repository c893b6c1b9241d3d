"""Selections of cells choose the same cells as sorting in plain Python."""

from functools import partial

import jax
import numpy as np
import pytest
from cells_oracle import HEADS, KV_HEADS, N, expected, parts

import sadsl as sa
from lowering.problem import Problem
from sadsl.selections import (
    cell_scores,
    mass,
    rules,
    scored,
    share,
    threshold,
    tiles,
    tokens,
    topk,
    within,
)
from sadsl.selections.ranking import heaviest, top
from sadsl.selections.static_cells import holding

BLOCK = 16
TILES = tiles((7, 10), (3, 4))
TALL = tiles((7, 10), (4, 5))


@pytest.fixture(autouse=True)
def quickly_compiled(quick_compilation):
    jax.config.update("jax_disable_most_optimizations", True)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q, K = drawn(2, N, HEADS, 8), drawn(2, N, KV_HEADS, 8, seed=1)
GATE = drawn(HEADS, 5, 5, seed=2)


@partial(jax.jit, static_argnames=("spec", "q_offset", "sm_scale"))
def parts_of(q, k, operands, spec, q_offset=0, sm_scale=None):
    return sa.select(
        spec, q, k, operands=operands, q_offset=q_offset, sm_scale=sm_scale
    )


def chosen(spec, q=Q, k=K, operands=None, **options):
    """The cells of a spec of one selection, bool ``[batch, heads, rows, columns]``."""
    (only,) = parts_of(q, k, operands or {}, spec, **options).values()
    return np.asarray(only)


CAUSAL, OWN = sa.causal(), sa.blocks(BLOCK)
MINMAX = scored("mean", normalise="minmax")
SPECS = [
    topk(3, block=BLOCK, block_q=1, forced=OWN, eligible=CAUSAL),
    topk(
        2, block=BLOCK, score="min_max", scope="group", eligible=CAUSAL,
        forced=sa.per_head(sa.sinks(1), OWN, OWN, sa.window(20)),
        rules=rules(otherwise="eligible"),
    ),
    topk(
        2, block=BLOCK, block_q=8, score=scored("mean", normalise="whole_softmax"),
        scope="group", forced=sa.sinks(1), eligible=CAUSAL,
    ),
    topk(2, block=TILES, block_q=TALL, scope="shared"),
    topk(2, block=BLOCK, scope="head", forced=OWN, rules=rules(forced_counts=False)),
    topk(tokens(50), block=BLOCK, score="max", scope="overall"),
    topk(
        share(0.6), block=BLOCK, score=scored("attention", scale=1.0), eligible=CAUSAL
    ),
    threshold(0.1, block=BLOCK, score="gate", forced=OWN, eligible=CAUSAL),
    threshold(0.3, block=5, score=scored("mean", normalise="softmax"), eligible=CAUSAL),
    mass(0.8, block=BLOCK, eligible=sa.per_head(CAUSAL, sa.window(30, 20))),
    mass(
        0.6, block=TILES, block_q=1, score=MINMAX, scope="block", forced=within(TILES)
    ),
    mass(0.7, block=BLOCK, score=MINMAX, scope="head", forced=OWN),
    mass(
        0.5, block=13, score=MINMAX, scope="overall", rules=rules(forced_counts=False)
    ),
]  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_choice_is_the_definition(spec):
    gate = {"gate": GATE} if spec.operands else {}
    found = chosen(spec, operands=gate)
    assert sa.parse(repr(spec)) == spec
    wanted = expected(spec, Q, K, GATE)
    if spec.scope == "shared":
        wanted = wanted[:, 0]
    assert found.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)
    assert wanted.any()
    assert not wanted.all()


def test_few_rows_at_a_time_choose_alike(monkeypatch):
    monkeypatch.setattr(cell_scores, "LIMIT", 2 * HEADS * 16 * N * 2)
    spec = topk(share(0.6), block=BLOCK, score=scored("attention", scale=1.01))
    found = chosen(spec)
    np.testing.assert_array_equal(found, expected(spec, Q, K))


GIVEN = topk(2, block=2, block_q=1, score="given", forced=sa.window(0), eligible=CAUSAL)


def given(row, spec=GIVEN):
    """The key blocks that the last of 8 queries chooses by these scores."""
    table = np.zeros((1, 8, 4), np.float32)
    table[0, -1] = row
    x = drawn(1, 8, 1, 4)
    return np.flatnonzero(chosen(spec, x, x, {"given": table})[0, 0, -1]).tolist()


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("row", "blocks"),
    [
        ([1, 1, 1, 0], [0, 3]),  # a tie goes to the lower index
        ([1, 2, 2, 0], [1, 3]),
        ([-0.0, 0.0, -1, 0], [0, 3]),
        ([NAN, 1, INF, 0], [1, 3]),
        ([-INF, NAN, -5, 0], [2, 3]),
        ([NAN, INF, -INF, NAN], [3]),  # none left: what is forced
    ],
)
def test_ties_and_what_is_no_number(row, blocks):
    assert given(row) == blocks


def test_a_row_without_a_finite_score_is_empty_where_nothing_is_forced():
    x = drawn(1, 8, 1, 4)
    for spec in (
        topk(3, block=2, score="given"),
        threshold(-9.0, block=2, score="given"),
        mass(0.9, block=2, score=scored("given", normalise="softmax")),
        mass(0.9, block=2, score=scored("given", normalise="minmax")),
    ):
        table = np.array([[NAN] * 4, [1, 2, 3, 4], [INF] * 4, [-INF, NAN, 1, NAN]])
        operands = {"given": table[None].astype(np.float32)}
        found = chosen(spec, x, x, operands)[0, 0]
        assert found.any(axis=1).tolist() == [False, True, False, True]
        assert found[3].tolist() == [False, False, True, False]
    some = {"given": np.full((1, 4, 4), NAN, np.float32)}
    out, lse = sa.attention(
        x, x, x, threshold(0.0, block=2, score="given"), operands=some,
        impl="reference", return_lse=True,
    )  # fmt: skip
    assert not np.any(out)
    assert np.all(np.asarray(lse) == -INF)


def test_a_budget_over_the_eligible_set_takes_it_all():
    for spec in (
        topk(99, block=BLOCK, eligible=CAUSAL, scope="overall"),
        mass(2.0, block=BLOCK, eligible=CAUSAL),
    ):
        assert (chosen(spec) == np.tri(5, dtype=bool)).all()
    nothing = topk(1, block=BLOCK, eligible=sa.keys(0, 0), rules=rules(at_least=2))
    assert not chosen(nothing).any()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("fraction", "columns", "kept"),
    [(0.1, 64, 3), (0.2, 64, 6), (0.5, 64, 18), (0.0, 9, 1)],
)
def test_shares_of_a_triangle(fraction, columns, kept):
    budget = share(fraction, of="triangle")
    x = np.zeros((1, columns, 1, 1), np.float32)
    assert chosen(topk(budget, block=1), x, x).sum(axis=-1).tolist() == [
        [[kept] * columns]
    ]


@pytest.mark.parametrize(
    ("fraction", "columns", "kept"),
    [(0.3, 10, 4), (0.5, 10, 6), (1.0, 10, 10), (0.3, 1, 1)],
)
def test_shares_of_the_columns(fraction, columns, kept):
    x = np.zeros((1, columns, 1, 1), np.float32)
    found = chosen(topk(share(fraction, plus=1), block=1), x, x)
    assert (found.sum(axis=-1) == kept).all()


def test_shares_of_the_eligible():
    x = np.zeros((1, 13, 1, 1), np.float32)
    budget = share(0.3, plus=1, of="eligible")
    found = chosen(topk(budget, block=1, eligible=sa.keys(3, 13)), x, x)
    assert (found.sum(axis=-1) == 4).all()


def test_winners_against_sorting():
    rng = np.random.default_rng(0)
    x = rng.choice([-2.5, -0.0, 0.0, 1e-30, 0.5, 3.0, 3e38, -3e38], (40, 33))
    x = np.where(rng.random(x.shape) < 0.3, rng.normal(size=x.shape), x)
    x = x.astype(np.float32)
    competing = rng.random(x.shape) < 0.8
    count = rng.integers(0, 36, 40).astype(np.int32)
    found = np.asarray(jax.jit(top)(x, competing, count))
    light = np.abs(x) * (np.abs(x) < 9)
    target = (light * competing).sum(axis=1) * rng.choice([0, 0.2, 0.9, 2], 40)
    fewest = jax.jit(heaviest)(light, competing, target.astype(np.float32))
    for row in range(40):
        inside = [i for i in range(33) if competing[row, i]]
        order = sorted(inside, key=lambda i: -x[row, i])
        assert np.flatnonzero(found[row]).tolist() == sorted(order[: count[row]])
        order = sorted(inside, key=lambda i: -light[row, i])
        held, taken = 0.0, []
        for i in order:
            if held >= target[row]:
                break
            taken.append(i)
            held += light[row, i]
        assert np.flatnonzero(fewest[row]).tolist() == sorted(taken)


MAPS = {
    "window": (sa.window(20, 3), 16, 8, 1),
    "rows": (sa.causal(), 1, 16, 1),
    "strided": (sa.strided(37), 8, 8, 1),
    "few": (sa.where(lambda q, k: (q * 5 + k) % 61 == 7), 4, 8, 1),
    "heads": (sa.per_head(sa.causal(), sa.blocks(9)), 16, 1, 2),
    "none": (sa.keys(4, 4), 16, 16, 1),
    "tiles": (sa.window(9), tiles((13, 10), (4, 3)), 8, 1),
    "own": (within(tiles((13, 10), (4, 3))), 1, tiles((13, 10), (4, 3)), 1),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("offset", [0, 21])
def test_cells_that_hold_a_pair(name, offset):
    a, rows, columns, num_heads = MAPS[name]
    lengths = (130 - offset, 130) if isinstance(rows, int) else (130, 130)
    found = np.asarray(holding(a, rows, columns, Problem(*lengths, num_heads, offset)))
    dense = a.dense(lengths[0] + offset, 130, num_heads)[:, offset:]
    r, c = parts(rows, lengths[0]), parts(columns, 130)
    wanted = [[dense[:, i][:, :, j].any(axis=(1, 2)) for j in c] for i in r]
    np.testing.assert_array_equal(found, np.moveaxis(np.array(wanted), 2, 0))


def test_tiles_are_named_as_their_map_has_them():
    for each in (TILES, TALL, tiles((3, 4, 5), (2, 2, 3)), tiles((12,), (5,))):
        label = np.zeros(each.num_positions, int)
        for i, members in enumerate(parts(each, each.num_positions)):
            label[members] = i
        same = label[:, None] == label[None, :]
        assert (within(each).dense(each.num_positions)[0] == same).all()
        assert sa.parse(repr(within(each))) == within(each)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("spec", "leak"),
    [
        (topk(2, block=8, block_q=1, forced=sa.blocks(8), eligible=CAUSAL), "none"),
        (topk(2, block=8, block_q=1, eligible=CAUSAL), "block"),
        (mass(0.5, block=8, block_q=1, forced=sa.blocks(8), eligible=CAUSAL), "block"),
        (topk(2, block=1, eligible=CAUSAL), "none"),
        (topk(2, block=8, eligible=CAUSAL), "block"),
        (topk(2, block=8, eligible=sa.window(9, 9)), "all"),
        (topk(2, block=8), "all"),
        (topk(2, block=8, scope="head", eligible=CAUSAL), "all"),
    ],
    ids=repr,
)
def test_what_leaks(spec, leak):
    assert spec.leak == leak


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: topk(0), ValueError, "topk: k=0 must be at least 1"),
        (lambda: topk(1.5), TypeError, "k=1.5 must be an integer"),
        (lambda: topk(1, block=0), ValueError, "block=0 must be at least 1"),
        (lambda: topk(1, score="a b"), ValueError, "or the name of an operand"),
        (lambda: topk(1, scope="row"), ValueError, "scope='row' must be one of"),
        (lambda: topk(1, scope="block"), ValueError, "use 'head' or 'overall'"),
        (lambda: topk(tokens(9), block=TILES), ValueError, "block of a known size"),
        (lambda: mass(0.0), ValueError, "p=0.0 must be above 0"),
        (lambda: scored("mean", normalise="l2"), ValueError, "normalise='l2' must be"),
        (lambda: share(1.5), ValueError, "fraction=1.5 must be from 0 to 1"),
        (lambda: share(0.5, of="row"), ValueError, "of='row' must be"),
        (lambda: tokens(0), ValueError, "count=0 must be at least 1"),
        (lambda: tiles((4, 4), (2,)), ValueError, "one entry each for every axis"),
        (lambda: rules(otherwise="all"), ValueError, "otherwise='all' must be"),
        (lambda: topk(1, forced="own"), TypeError, "forced='own' must be an index map"),
        (
            lambda: topk(1, eligible=sa.segments()),
            ValueError,
            "eligible=segments.. reads the run-time arrays .*kv_segment_ids",
        ),
        (lambda: topk(1, forced=topk(1)), ValueError, "reads the run-time arrays"),
    ],
)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("spec", "operands", "text"),
    [
        (topk(1, score="gate"), {}, "reads 'gate', scores .* pass operands="),
        (
            topk(1, block=BLOCK, score="gate"),
            {"gate": np.zeros((3, 5, 5), np.float32)},
            r"\(3, 5, 5\) without its batch axis: it must be \(heads, 5, 5\)",
        ),
        (
            topk(1, block=8, score="gate"),
            {"gate": GATE},
            r"must be \(heads, 9, 9\), a score for every cell of 8 queries and 8 keys",
        ),
        (
            topk(1, block=BLOCK, score="gate"),
            {"gate": np.zeros((1, 5, 5), np.int32)},
            "has dtype int32: it must be of floats",
        ),
        (topk(1, block=tiles((7, 9), (3, 3))), {}, "63 positions, but there are 70"),
    ],
    ids=["missing", "heads", "blocks", "dtype", "tiles"],
)
def test_calls_that_do_not_fit(spec, operands, text):
    with pytest.raises(ValueError, match=text):
        sa.select(spec, Q, K, operands=operands)
