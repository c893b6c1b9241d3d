"""Entries of tables within a range of values are found, and only those."""

import numpy as np
import pytest

import sadsl as sa
from lowering import ir, pipeline, planning
from lowering.ranges.entries import around, held


@pytest.mark.parametrize("count", [1, 13, 37, 130])
def test_held_finds_entries_by_definition(count):
    rng = np.random.default_rng(count)
    values = tuple(rng.integers(-50, 50, count).tolist())
    for most in (1, 2, 5, count):
        first = rng.integers(0, count, 400)
        last = np.minimum(first + rng.integers(0, most, 400), count - 1)
        low = rng.integers(-70, 70, 400)
        high = low + rng.integers(0, 9, 400)
        some, exact = held(values, first, last, low, high)
        wanted = [
            any(c <= v <= d for v in values[a : b + 1])
            for a, b, c, d in zip(first, last, low, high, strict=True)
        ]
        np.testing.assert_array_equal(some[exact], np.array(wanted)[exact])
        assert not (np.array(wanted) & ~some).any()
        assert most > 1 or exact.all()


def test_around_splits_sums_only():
    table = ir.Table((3, 1, 2), ir.Var("q"))
    k = ir.Var("k")
    assert around(k, table) == (0, k)
    factor, rest = around(ir.Add(ir.Mul(table, -1), k), table)
    assert factor == -1
    assert ir.axes(rest) == {"k"}
    assert around(ir.Mod(table, 2), table) is None
    assert around(ir.Add(ir.Mod(table, 2), k), table) is None


def test_squares_without_an_entry_are_not_split():
    """Each row of blocks has one. Squares are split into quarters and into halves."""
    n = 1024
    drawn = np.random.default_rng(0).integers(0, n, n)
    of = sa.table(drawn.tolist())
    spec = sa.where(lambda q, k: of[q] == k).lift(64)
    node = pipeline.run(spec.node, pipeline.Problem(64 * n, 64 * n)).planned.maps[0]
    tree = planning.squares(
        node, planning.BlockSizes(64 * n, 64 * n, 64, 64), exact=False
    )
    assert tree.count() == (n, 0)
    assert sum(level.kind.size for level in tree.levels) < 40 * n
