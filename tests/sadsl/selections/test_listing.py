"""``largest`` against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sadsl.selections.listing import first_set, largest, pack


def rows_of(kind, rows, n, rng):
    x = rng.normal(size=(rows, n)).astype(np.float32)
    match kind:
        case "ties":
            return np.round(x)
        case "constant":
            return np.zeros_like(x)
        case "sorted":
            return np.sort(x, axis=1)
        case "missing":
            return np.where(rng.random(x.shape) < 0.7, -np.inf, x).astype(np.float32)
        case "huge":
            return (x * 1e30).astype(np.float32)
        case "zeros":
            return np.where(rng.random(x.shape) < 0.5, 0.0, -0.0).astype(np.float32)
        case "causal":
            at = np.arange(n)[None] > np.linspace(0, n - 1, rows).astype(int)[:, None]
            return np.where(at, -np.inf, x).astype(np.float32)
    return x


def by_sort(x, count):
    found = np.full((len(x), count), x.shape[1], np.int32)
    for row, scores in enumerate(x):
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > -np.inf][:count]
        found[row, : len(order)] = np.sort(order)
    return found


KINDS = ["normal", "ties", "constant", "sorted", "missing", "huge", "zeros", "causal"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("n", "count"), [(1, 1), (37, 5), (200, 200), (1030, 16), (512, 700)]
)
def test_lists_are_those_of_a_stable_sort(n, count):
    rng = np.random.default_rng(n)
    run = jax.jit(lambda x: largest(x, count))
    for kind in KINDS:
        x = rows_of(kind, 7, n, rng)
        np.testing.assert_array_equal(run(x), by_sort(x, count), err_msg=kind)


def test_many_alike_neighbours_fall_back_to_whole_rows():
    """One group of neighbours holds more candidates than the short list."""
    x = np.full((3, 4096), -1.0, np.float32)
    x[:, :512] = np.linspace(2, 1, 512)
    x[1] = x[1, ::-1]
    np.testing.assert_array_equal(largest(jnp.asarray(x), 16), by_sort(x, 16))


def test_first_set_finds_the_set_bits():
    rng = np.random.default_rng(0)
    mask = rng.random((5, 160)) < 0.3
    found = np.asarray(first_set(pack(jnp.asarray(mask)), 20))
    for row, held in zip(found, mask, strict=True):
        np.testing.assert_array_equal(row, np.flatnonzero(held)[:20])
