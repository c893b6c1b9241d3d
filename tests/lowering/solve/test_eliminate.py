"""Elimination agrees with dense maps: existence, the first and the last position."""

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify
from lowering.facts.first_and_last import first_and_last
from lowering.solve.by_axis import factors
from lowering.solve.eliminate import exists, extremes

SUPPRESS = list(HealthCheck)


def dense(node, n):
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return np.broadcast_to(evaluate(node, NumPy(q, k)), (n, n))


def resolved(spec, n):
    return ir.substitute(spec.node, {"n": ir.Const(n)})


def ends(pairs):
    """The first and the last true column of each row, -1 for none."""
    some, n = pairs.any(axis=1), pairs.shape[1]
    first = np.where(some, pairs.argmax(axis=1), -1)
    return first, np.where(some, n - 1 - pairs[:, ::-1].argmax(axis=1), -1)


def grid_map(h, w, rule):
    """A map of the rows and columns of a grid, as ``where`` spells it."""

    def at(x):
        inside = type(x)(ir.Within(x.node, h * w))
        return (inside // w) % h, inside % w

    return sa.where(lambda q, k: rule(*at(q), *at(k)))


SOLVABLE = [
    sa.full(),
    ~sa.full(),
    sa.causal(),
    sa.window(3, 1),
    sa.offsets({0, 3, -2}),
    ~sa.offsets({1, 2, 5}),
    sa.strided(5),
    ~sa.strided(3),
    sa.dilated(3, 0, 4),
    sa.blocks(6),
    sa.window(2).lift(4),
    sa.strided(4) & sa.strided(6),
    sa.strided(3) & sa.blocks(7),
    sa.causal() & (sa.window(3) | sa.sinks(2)),
    sa.where(lambda q, k: 3 * q - 2 * k == 1),
    sa.where(lambda q, k: (5 * q + 3 * k) % 7 == 2),
    sa.where(lambda q, k: (2 * q + 4 * k) % 6 == 2),
    sa.where(lambda q, k: 2 * (k // 3) - q // 2 <= 4),
    sa.where(lambda q, k: q + 5 - 3 * (k // 4) <= 2),
    sa.where(lambda q, k: abs(q - k) % 4 == 1),
    sa.where(lambda q, k: k % 5 <= q % 3),
    sa.where(lambda q, k: sa.minimum(q, k) + sa.maximum(k, 7) >= 20),
    sa.where(lambda q, k: sa.floor_log2(q - k) == 2),
    sa.where(lambda q, k: sa.floor_log2(k) != 3),
    sa.where(lambda q, k: sa.table((0, 3, 1))[k % 3] <= q % 4),
    sa.where(lambda q, k: (k // 4) % 3 == q % 3),
    sa.where(lambda q, k: (k % 4 <= q % 4) & (k // 4 == q // 4)),
    grid_map(5, 8, lambda a, b, c, d: (abs(a - c) <= 1) & (abs(b - d) <= 2)),
    grid_map(5, 8, lambda a, b, c, d: (a == c) | (b == d)),
    grid_map(8, 5, lambda a, b, c, d: (a % 2 == c % 2) & (d // 2 <= b)),
    sa.Grid(t=2, h=4, w=5).neighborhood((1, 3, 2), stride=(1, 2, 1)),
]


@pytest.mark.parametrize("spec", SOLVABLE, ids=lambda x: repr(x)[:60])
def test_exact_on_what_it_names(spec):
    """Existence and extremes of the key, and of the query."""
    grids = any(isinstance(x, ir.Within) for x in ir.walk(spec.node))
    for n in (40,) if grids else (1, 7, 13, 40):
        node = resolved(spec, n)
        pairs = dense(node, n)
        for x, rows in ((ir.K, pairs), (ir.Q, pairs.T)):
            first, last = extremes(node, x, n - 1, np.arange(n))
            np.testing.assert_array_equal(first, ends(rows)[0])
            np.testing.assert_array_equal(last, ends(rows)[1])
            some = exists(node, x, ir.Const(n - 1))
            assert x.axis not in ir.axes(some)
            held = dense(some, n) if x == ir.K else dense(some, n).T
            np.testing.assert_array_equal(held[:, 0], rows.any(axis=1))


@settings(max_examples=few(120), suppress_health_check=SUPPRESS)
@given(strategies.composed(4), strategies.SIZES)
def test_random_maps(spec, n):
    """The first and last key and query, with the walk over blocks where need be."""
    node = resolved(spec, n)
    pairs = dense(node, n)
    for x, rows in ((ir.K, pairs), (ir.Q, pairs.T)):
        found = first_and_last(node, x, n)
        for got, expected in zip(found, ends(rows), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_the_length_may_stay_open():
    """``exists`` with a symbolic end: the answer holds at every length."""
    spec = sa.where(lambda q, k: (k >= q + 3) & ((q - k) % 4 == 0))
    some = exists(spec.node, ir.K, ir.Add(ir.N, ir.Const(-1)))
    for n in (1, 3, 4, 5, 13):
        held = dense(ir.substitute(some, {"n": ir.Const(n)}), n)[:, 0]
        np.testing.assert_array_equal(held, spec.dense(n)[0].any(axis=1))


def test_parts_without_the_unknown_stay():
    node = simplify(ir.And((ir.Le(ir.Q, ir.Const(7)), ir.Le(ir.K, ir.Q))))
    assert exists(node, ir.K, ir.Const(9)) == ir.Le(ir.Q, ir.Const(7))


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        (lambda q, k: sa.power_of_two(q - k), r"power_of_two\(q - k\)"),
        (lambda q, k: sa.operand("x")[k] <= q, r"operand\('x'\)\[k\] - q <= 0"),
        (lambda q, k: sa.floor_log2(q - k) <= q, r"floor_log2\(q - k\) - q <= 0"),
        (lambda q, k: sa.floor_log2(k) % 3 == 0, r"floor_log2\(k\) % 3 == 0"),
    ],
)
def test_what_resists_is_named(rule, part):
    node = simplify(sa.where(rule).node)
    with pytest.raises(NotImplementedError, match=f"cannot solve `{part}` for k"):
        exists(node, ir.K, ir.Const(9))


def test_too_many_cases():
    spec = sa.where(lambda q, k: (k % 61 <= q % 61) & (q % 59 <= k % 59))
    with pytest.raises(NotImplementedError, match="more than 256"):
        exists(spec.node, ir.K, ir.Const(9))


def test_factors():
    """A product of maps of axes comes apart, and holds iff all its factors do."""
    spec = sa.Grid(t=3, h=4, w=5).product(t=sa.causal(), w=sa.window(1, 1))
    parts = factors(simplify(spec.node), 60)
    assert [size for _, size in parts] == [5, 4, 3] or parts[0][1] == 5
    held, weight = np.ones((60, 60), bool), 1
    for node, size in parts:
        digit = np.arange(60) // weight % size
        held &= dense(node, size)[digit[:, None], digit[None, :]]
        weight *= size
    assert weight == 60
    np.testing.assert_array_equal(held, spec.dense(60)[0])
    assert factors(simplify(sa.causal().node), 60) is None
    assert factors(simplify((spec & sa.causal()).node), 60) is None


@settings(max_examples=few(60), suppress_health_check=SUPPRESS)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(0, 2))
def test_grids_by_hand(h, w, near, far):
    spec = grid_map(
        h, w, lambda a, b, c, d: (a - c <= near) & (c <= a) & (abs(b - d) <= far)
    )
    pairs = spec.dense(h * w)[0]
    for x, rows in ((ir.K, pairs), (ir.Q, pairs.T)):
        found = extremes(spec.node, x, h * w - 1, np.arange(h * w))
        for got, expected in zip(found, ends(rows), strict=True):
            np.testing.assert_array_equal(got, expected)
