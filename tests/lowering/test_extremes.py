"""The least and the greatest of consecutive entries, by windows, are the true ones."""

import numpy as np
import pytest

from lowering.ranges import extremes


@pytest.mark.parametrize("wide", [4, 64])
@pytest.mark.parametrize("count", [1, 5, 16, 17, 300, 4097])
def test_bounds_of_any_ranges_of_entries(count, wide, monkeypatch):
    monkeypatch.setattr(extremes, "WIDE", wide)
    extremes._windows.cache_clear()
    rng = np.random.default_rng(count)
    values = tuple(rng.integers(-50, 50, count).tolist())
    first = rng.integers(0, count, 400)
    last = np.minimum(first + rng.integers(0, count, 400), count - 1)
    low, high = extremes.bounds_of(np, values, first, last)
    slices = [values[a : b + 1] for a, b in zip(first, last, strict=True)]
    np.testing.assert_array_equal(low, [min(x) for x in slices])
    np.testing.assert_array_equal(high, [max(x) for x in slices])
    extremes._windows.cache_clear()


@pytest.mark.parametrize("width", [1, 4, 6, 64, 256])
def test_bounds_of_ranges_of_one_length(width):
    values = tuple(np.random.default_rng(0).permutation(5000).tolist())
    first = np.arange(0, 5000 - width, width)
    low, high = extremes.bounds_of(np, values, first, first + width - 1)
    groups = np.array(values)[first[:, None] + np.arange(width)]
    np.testing.assert_array_equal(low, groups.min(axis=1))
    np.testing.assert_array_equal(high, groups.max(axis=1))


def test_long_tables_take_linear_memory():
    values = tuple(range(100_000))
    fine, coarse = extremes._windows(values)
    assert coarse is not None
    assert sum(x.nbytes for x in (*fine, *coarse)) < 20 * 4 * len(values)


def test_numbers_beyond_32_bits_stay_exact():
    values = (1 << 40, -(1 << 50), 3)
    low, high = extremes.bounds_of(np, values, np.array([0, 1]), np.array([2, 2]))
    assert (low.tolist(), high.tolist()) == ([-(1 << 50)] * 2, [1 << 40, 3])
