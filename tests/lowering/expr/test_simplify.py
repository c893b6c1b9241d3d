"""Passes keep the selected pairs, and interval analysis is sound."""

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import ir
from lowering.expr import heads
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.fits import known_of
from lowering.expr.kernel_test import KernelPredicate, join
from lowering.expr.printing import show
from lowering.expr.simplify import simplify
from lowering.hoist import hoist
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.verdicts import Analysis
from lowering.run_time.vectors import vectors_of

Q, K = np.arange(41)[:, None], np.arange(37)[None, :]


def selects(node):
    return np.broadcast_to(evaluate(node, NumPy(Q, K)), (41, 37))


@settings(max_examples=few(400), suppress_health_check=list(HealthCheck))
@given(strategies.composed())
def test_simplify_keeps_the_selection_and_is_idempotent(spec):
    (node,) = heads.per_head(spec.node, 1)
    simple = simplify(node)
    np.testing.assert_array_equal(selects(simple), selects(node), err_msg=repr(spec))
    again = simplify(simple)
    np.testing.assert_array_equal(selects(again), selects(node), err_msg=repr(spec))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (sa.causal(), "k - q <= 0"),
        (sa.causal() & sa.full(), "k - q <= 0"),
        (sa.causal() & ~sa.causal(), "False"),
        (sa.causal() | ~sa.causal(), "True"),
        (sa.causal() & sa.window(4), "(k - q <= 0) & (q - k <= 4)"),
        (sa.window(3) & sa.window(9), "(q - k <= 3) & (k - q <= 0)"),
        (sa.window(3) | sa.causal(), "k - q <= 0"),
        (
            sa.causal() & (sa.window(4) | sa.sinks(2)),
            "(k - q <= 0) & ((q - k <= 4) | (k <= 1))",
        ),
        (sa.sinks(3) | sa.sinks(8), "k <= 7"),
        (sa.strided(1), "True"),
        (sa.offsets({1, 2, 3}), "(k - q <= -1) & (q - k <= 3)"),
        (sa.offsets(()), "False"),
        (sa.keys(4, 4), "False"),
        (sa.blocks(6).lift(4), "k // 24 - q // 24 == 0"),
        (sa.where(lambda q, k: 2 * q + 1 <= 2 * k), "q - k <= -1"),
        (sa.where(lambda q, k: (4 * q + k) % 4 == 7), "False"),
        (sa.where(lambda q, k: (q - k) // 4 <= 2), "q - k <= 11"),
        (sa.where(lambda q, k: (q - k) // 4 >= 2), "k - q <= -8"),
        (sa.where(lambda q, k: (8 * q + 5) // 4 <= k), "q * 2 - k <= -1"),
        (sa.where(lambda q, k: sa.minimum(q, q + 1) <= k), "q - k <= 0"),
    ],
    ids=str,
)
def test_normal_forms(spec, text):
    assert show(simplify(spec.node)) == text


@settings(max_examples=few(400), suppress_health_check=list(HealthCheck))
@given(strategies.composed(), st.integers(0, 40), st.integers(0, 36), st.data())
def test_verdicts_are_true(spec, q, k, data):
    q_end, k_end = data.draw(st.integers(q, 40)), data.draw(st.integers(k, 36))
    node = simplify(heads.per_head(spec.node, 1)[0])
    pairs = selects(node)[q : q_end + 1, k : k_end + 1]
    at = Rectangles(*(np.array([x]) for x in (q, q_end, k, k_end)))
    leaf = (
        data.draw(st.integers(1, q_end - q + 1)),
        data.draw(st.integers(1, k_end - k + 1)),
    )
    verdict = Analysis(Ranges(at, leaf))(node)
    told = {
        name: bool(x[0]) for name, x in verdict._asdict().items() if name != "reads"
    }
    assert not told["none"] or not pairs.any()
    assert not told["all"] or pairs.all()
    assert not told["hit"] or pairs.any()
    assert not told["miss"] or not pairs.all()
    for i in range(pairs.shape[0] - leaf[0] + 1):
        for j in range(pairs.shape[1] - leaf[1] + 1):
            tile = pairs[i : i + leaf[0], j : j + leaf[1]]
            assert not told["hits"] or tile.any(), (repr(spec), i, j)
            assert not told["misses"] or not tile.all(), (repr(spec), i, j)
    if pairs.size == 1:  # a single pair is always settled
        assert told["none"] != told["all"]


@pytest.mark.slow
@settings(max_examples=few(40), suppress_health_check=list(HealthCheck))
@given(st.lists(strategies.composed(3), min_size=1, max_size=3))
def test_the_kernel_predicate_selects_the_same_pairs(specs):
    nodes = tuple(simplify(heads.per_head(spec.node, 1)[0]) for spec in specs)
    found = hoist(nodes, known_of(41, 37))
    predicate = KernelPredicate(found.maps)
    q_vectors = tuple(x[0, 0][:, None] for x in vectors_of(found.q, 41, 1, {}))
    kv_vectors = tuple(x[0, 0][None, :] for x in vectors_of(found.kv, 37, 1, {}))
    q, k = Q.astype(np.int32), K.astype(np.int32)
    for m, node in enumerate(nodes):
        for index in (m, np.int32(m)):
            held = predicate(index, q, k, q_vectors, kv_vectors)
            np.testing.assert_array_equal(
                np.broadcast_to(held, (41, 37)), selects(node)
            )


def test_maps_that_differ_in_constants_become_one_test():
    windows = [sa.causal() & sa.window(n) for n in (3, 9, 27)]
    joined = join(tuple(simplify(w.node) for w in windows))
    assert show(joined) == "(k - q <= 0) & (q - k <= table((3, 9, 27))[h])"
    assert join((simplify(sa.causal().node), simplify(sa.strided(3).node))) is None
    strides = tuple(simplify(sa.strided(n).node) for n in (3, 5))
    assert join(strides) is None  # divisors are compiled in


def test_operands_decide_nothing_before_run_time():
    node = simplify((sa.causal() & sa.segments()).node)
    at = Rectangles(*(np.array([x]) for x in (8, 15, 0, 7)))
    verdict = Analysis(Ranges(at))(node)
    assert not verdict.none[0]
    assert not verdict.all[0]
    below = Rectangles(*(np.array([x]) for x in (0, 7, 8, 15)))
    assert Analysis(Ranges(below))(node).none[0]


def test_known_ranges_of_operands_decide():
    node = simplify(sa.segments().node)
    q, k = ir.Operand("q_segment_ids", (ir.Q,)), ir.Operand("kv_segment_ids", (ir.K,))
    at = Rectangles(*(np.array([0, 0, 0]),) * 4)
    ranges = {
        q: (np.array([0, 3, 2]), np.array([1, 3, 5])),
        k: (np.array([2, 3, 4]), np.array([4, 3, 9])),
    }
    verdict = Analysis(Ranges(at, operands=ranges))(node)
    np.testing.assert_array_equal(verdict.none, [True, False, False])
    np.testing.assert_array_equal(verdict.all, [False, True, False])
