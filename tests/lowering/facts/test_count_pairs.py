"""Counts of pairs are exact: by every rule, for random maps, in any order."""

import tracemalloc
from dataclasses import replace

import numpy as np
import published
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import pipeline
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify
from lowering.facts import count_pairs as pairs
from lowering.facts import plan_counts
from lowering.facts.first_and_last import in_finite
from lowering.ranges import refine
from lowering.ranges.ranges import Rectangles
from lowering.solve.by_level import in_levels
from sadsl import catalog


def dense(node, q_seq_len, kv_seq_len):
    q, k = np.arange(q_seq_len)[:, None], np.arange(kv_seq_len)[None, :]
    return np.broadcast_to(evaluate(node, NumPy(q, k)), (q_seq_len, kv_seq_len))


def maps_of(spec, q_seq_len, kv_seq_len=None, num_heads=1, q_offset=0):
    problem = pipeline.Problem(q_seq_len, kv_seq_len or q_seq_len, num_heads, q_offset)
    return pipeline.run(spec.node, problem)["simplify"].maps


RULES = {
    "branches": pairs.count_by_branches,
    "levels": pairs.count_by_levels,
    "diagonals": pairs.count_on_diagonals,
    "form": pairs.count_by_form,
}


@pytest.fixture
def never_dense(monkeypatch):
    """Short maps are counted like long ones."""
    monkeypatch.setattr(pairs, "DENSE", 0)


def all_counts(node, q_seq_len, kv_seq_len):
    found = {name: rule(node, q_seq_len, kv_seq_len) for name, rule in RULES.items()}
    return {name: count for name, count in found.items() if count is not None}


@settings(max_examples=few(150), deadline=None)
@given(strategies.composed(), strategies.SIZES, strategies.SIZES, st.integers(0, 9))
def test_every_rule_that_applies_counts_right(spec, q_seq_len, kv_seq_len, q_offset):
    q_seq_len = min(q_seq_len, strategies.POSITIONS - q_offset)
    (node,) = maps_of(spec, q_seq_len, kv_seq_len, 1, q_offset)
    expected = dense(node, q_seq_len, kv_seq_len).sum()
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "DENSE", 0)
        patch.setattr(pairs, "CHUNK", 100)
        found |= all_counts(node, q_seq_len, kv_seq_len)
        patch.setattr(refine, "LEAF", 5)
        patch.setattr(refine, "AT_ONCE", 7)
        found["descent"] = pairs.count_pairs(node, q_seq_len, kv_seq_len)
    assert found == dict.fromkeys(found, expected)


@pytest.mark.sample(12)
@pytest.mark.parametrize("case", published.CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("never_dense")
def test_published_mechanisms_are_counted_by_their_form(case):
    for size in (case.sizes[0], case.larger):
        n = case.length(size)
        for node in maps_of(case.make(size), n, num_heads=case.heads):
            expected = dense(node, n, n).sum()
            found = all_counts(node, n, n)
            assert found == dict.fromkeys(found, expected)
            assert "form" in found


# Maps of rows and columns, also of a last row that is short.
GRIDS = (
    (catalog.radial(12, 5), 60, 60),
    (catalog.radial(12, 5, text_tokens=3), 63, 63),
    (catalog.neighborhood((6, 10), (3, 5)), 60, 60),
    (sa.Grid(t=4, h=5, w=6).product(h=sa.window(1), w=sa.strided(2)), 120, 120),
    (sa.where(lambda q, k: (q // 8 - k // 8) % 3 == 0) & sa.causal(), 61, 50),
    (sa.where(lambda q, k: (q % 8 <= k % 8) & (k - q <= 5)), 50, 97),
    (sa.where(lambda q, k: (q % 8 <= k % 8) | sa.isin(q + 2 * k, {9, 11, 40})), 70, 48),
    (sa.where(lambda q, k: (q % 6 <= k % 3) & ~(q + 3 == 2 * k)), 36, 60),
    (sa.where(lambda q, k: sa.power_of_two(q - k) & (q % 7 != k % 7)), 130, 130),
)


@pytest.mark.parametrize("i", range(len(GRIDS)))
@pytest.mark.usefixtures("never_dense")
def test_grids_are_counted_digit_by_digit(i):
    spec, q_seq_len, kv_seq_len = GRIDS[i]
    (node,) = maps_of(spec, q_seq_len, kv_seq_len)
    node = simplify(in_finite(node, 130))
    expected = dense(node, q_seq_len, kv_seq_len)
    assert pairs.count_by_levels(node, q_seq_len, kv_seq_len) == expected.sum()
    # The predicate in digits is the same one, and every pair of digits is one pair.
    found, levels = in_levels(node, q_seq_len, kv_seq_len)
    assert len(levels) > 1
    q, k = (np.indices([x[i] for x in levels[::-1]]) for i in (2, 3))
    q, k = (x[::-1].reshape(len(levels), -1) for x in (q, k))
    operands = {x.q.name: q[i][:, None] for i, x in enumerate(levels)}
    operands |= {x.k.name: k[i][None, :] for i, x in enumerate(levels)}
    held = evaluate(found, NumPy(q[:1].T, k[:1], 0, operands))
    np.testing.assert_array_equal(held[:q_seq_len, :kv_seq_len], expected)
    assert held.sum() == expected.sum()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (sa.window(3), "not read by the same digits"),
        (sa.where(lambda q, k: sa.maximum(q % 8, q // 8) <= k), "a number mixes"),
        (sa.where(lambda q, k: q % 8 + q // 8 <= k % 8), "digits overlap"),
        (sa.where(lambda q, k: sa.isin(q // 4 * 4 - k, {*range(0, 999, 7)})),
         "a test mixes digits"),
    ],
)  # fmt: skip
def test_digits_that_mix(spec, message):
    (node,) = maps_of(spec, 1000)
    with pytest.raises(NotImplementedError, match=message):
        in_levels(node, 1000, 1000)


@pytest.mark.parametrize(
    "spec",
    [
        # Of one modulus, alike and apart; of several; beside what is whole.
        sa.strided(6) | sa.dilated(3, 2, 6),
        sa.strided(6) | sa.where(lambda q, k: (q + k) % 6 == 1),
        sa.strided(6) | sa.strided(4) | sa.window(2),
        (sa.strided(5) & sa.causal()) | (sa.strided(3) - sa.causal()) | sa.keys(2, 9),
        sa.where(lambda q, k: (k % 4 == q % 3) & (k > 2 * q)) | sa.queries(7, 9),
        # Empty rows, bounds out of reach.
        sa.strided(9) & sa.where(lambda q, k: k >= q + 50),
        sa.where(lambda q, k: (k >= 3 * q) & (k <= q - 1)),
    ],
)
@pytest.mark.parametrize("q_seq_len", [1, 61])
def test_residue_classes_count_once(spec, q_seq_len):
    (node,) = maps_of(spec, q_seq_len, 97)
    expected = dense(node, q_seq_len, 97).sum()
    assert pairs.count_by_branches(node, q_seq_len, 97) == expected


def test_too_many_residue_classes_are_left_to_others():
    (node,) = maps_of(sa.strided(67) | sa.strided(71) | sa.keys(0, 3), 300)
    assert pairs.count_by_branches(node, 300, 300) is None
    assert pairs.count_pairs(node, 300, 300) == dense(node, 300, 300).sum()


@pytest.mark.usefixtures("never_dense")
def test_a_permutation_changes_no_count():
    n = 600
    order = np.random.default_rng(0).permutation(n)
    spec = sa.window(20, 0) | sa.keys(0, 5)
    (node,) = maps_of(spec, n)
    (moved,) = maps_of(spec.permute(order), n)
    expected = dense(node, n, n).sum()
    assert pairs.count_by_form(moved, n, n) == dense(moved, n, n).sum() == expected
    # Not so if the position decides too, or if the table holds other numbers.
    (bare,) = maps_of(spec.permute(order) & sa.strided(7), n)
    assert pairs.count_pairs(bare, n, n) == dense(bare, n, n).sum()
    (part,) = maps_of(spec.permute(order), n - 50)
    count = pairs.count_pairs(part, n - 50, n - 50)
    assert count == dense(part, n - 50, n - 50).sum() != expected


SPECS = (
    sa.strided(8),
    sa.per_head(sa.strided(16) & sa.causal(), sa.window(9), sa.blocks(8)),
    sa.dilated(12, 12, 4) | sa.keys(0, 1),
    catalog.neighborhood((16, 16), (5, 5)),
    catalog.mminference_grid((16, 16 + 180), 6, sink=8, local=8, block=8),
)


@pytest.mark.parametrize("q_offset", [0, 3])
@pytest.mark.parametrize("i", range(len(SPECS)))
@pytest.mark.usefixtures("never_dense")
def test_every_order_of_positions_counts_alike(i, q_offset):
    n, heads = 256 - q_offset, 3
    expected = SPECS[i].dense(256, num_heads=heads)[:, q_offset:]
    sizes = {"block_q": 8, "block_kv": 8, "num_heads": heads, "q_offset": q_offset}
    plans = [sa.plan(SPECS[i], n, 256, relayout=x, **sizes) for x in (True, False)]
    for plan in plans:
        each = np.asarray(plan.pairs_of_maps)[np.asarray(plan.mask.map_of_head)]
        np.testing.assert_array_equal(each, expected.sum(axis=(1, 2)))
        assert plan.num_pairs == sum(plan.pairs_of_maps)
        # And so do the blocks, which are all that some maps leave.
        looked = tuple(plan._count_in_runs(m) for m in range(len(plan.maps)))
        assert looked == plan.pairs_of_maps


@pytest.mark.parametrize("q_offset", [0, 3])
@pytest.mark.usefixtures("never_dense")
def test_in_another_order_the_form_of_the_given_one_counts(q_offset, monkeypatch):
    n = 256 - q_offset
    plan = sa.plan(sa.strided(8), n, 256, block_q=8, block_kv=8, q_offset=q_offset)
    assert plan.layouts is not None
    with monkeypatch.context() as patch:
        patch.setattr(plan_counts, "count_within", None)
        assert plan.num_pairs == n * 32
    # A plan that does not know its maps in the given order counts all the same.
    assert replace(plan, given_maps=()).num_pairs == n * 32


VIDEO = (16, 64, 64)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (catalog.swapped_window(VIDEO, (4, 8, 8)), 2**16 * 4 * 8 * 8),
        (catalog.swapped_window(VIDEO, (5, 9, 9), sliding=True), 2**16 * 5 * 9 * 9),
        (catalog.axial(h=256, w=256), 2 * 2**16 * 256),
        (sa.strided(128), 128 * 512**2),
        (sa.strided(128) & sa.causal(), 128 * 512 * 513 // 2),
        (~(sa.strided(128) | sa.strided(96)),
         2**32 - sum(int(np.bincount(np.arange(2**16) % m) @
                         np.bincount(np.arange(2**16) % m)) * s
                     for m, s in ((128, 1), (96, 1), (384, -1)))),
    ],
)  # fmt: skip
def test_long_sequences_by_their_form(spec, expected):
    n = 2**16
    maps = maps_of(spec, n, num_heads=2)
    assert sum(pairs.count_by_form(node, n, n) for node in maps) == expected


def test_the_descent_holds_little():
    n = 8192
    (node,) = maps_of(sa.strided(64), n)
    whole = Rectangles(*(np.array([x]) for x in (0, n - 1, 0, n - 1)))
    tracemalloc.start()
    count = refine.count_within(node, whole)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == n * n // 64
    # All of its rectangles at once, or all pairs of some, would be over 28 MB.
    assert peak < 2e7
