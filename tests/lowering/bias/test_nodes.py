"""A bias is split into what kernels compute and what is made outside of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowering.bias import nodes
from lowering.problem import Problem
from lowering.run_time import bias_values
from sadsl.maps.numbers import log, weights
from sadsl.maps.symbols import operand
from sadsl.terms.biases import alibi, bias, distance_bias, key_bias, pair_bias, t5_bias
from sadsl.terms.query_biases import gate_bias, query_distance_bias


def layouts_of(x, heads=4):
    lowered = nodes.lower(x.score(heads), Problem(20, 30, heads))
    return tuple(len(arrays) for arrays in lowered.outside)


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (alibi(), (1, 0, 0, 0)),
        (bias(lambda q, k: -0.5 * abs(q - k)), (0, 0, 0, 0)),
        (t5_bias(), (0, 0, 1, 0)),
        (t5_bias("a") + distance_bias("b", 5), (0, 0, 1, 0)),
        (key_bias("a") + bias(lambda q, k: weights("b")[k // 2]), (0, 1, 0, 0)),
        (pair_bias("a"), (0, 0, 0, 1)),
        (bias(lambda q, k, h: weights("a")[h, q // 4 - k // 4 + 9]), (0, 0, 0, 1)),
        (bias(lambda q, k, h: weights("a")[(2 * q - 2 * k + 99) // 3]), (0, 0, 1, 0)),
        (bias(lambda q, k: weights("a")[q] - 1.0 * weights("b")[k]), (1, 1, 0, 0)),
        (bias(lambda q, k: weights("a")[q] * weights("b")[k]), (1, 1, 0, 0)),
        (bias(lambda q, k: 0.5 * operand("p")[q]), (1, 0, 0, 0)),
        # Products that differ in one array alone share it.
        (
            query_distance_bias("x", "t", 3, 8, bias(lambda q, k: 1 + 0.5 * log(q))),
            (3, 0, 3, 0),
        ),
        # The whole part of a running sum is added to no other vector.
        (gate_bias("g") + bias(lambda q, k: weights("b")[q]), (2, 2, 0, 0)),
    ],
)
def test_each_part_is_made_in_the_smallest_layout(x, wanted):
    """Vectors of queries and of keys, diagonals, all pairs."""
    assert layouts_of(x) == wanted


def test_equal_terms_count_as_often_as_they_are_written():
    x = bias(lambda q, k: 0.5 * (q - k))
    lowered = nodes.lower((x + x).score(1), Problem(4, 4))
    at = np.arange(4, dtype=np.int32)
    found = lowered.kernel(at[:, None], at[None], (), (), ())
    np.testing.assert_array_equal(found, at[:, None] - at[None])


def test_whole_parts_of_running_sums_come_first():
    """Nothing is added before their difference is taken, which is exact."""
    x = bias(lambda q, k: weights("b")[k] - 0.3 * (q - k)) + gate_bias("g")
    kernel = nodes.lower(x.score(1), Problem(4, 4)).kernel
    assert [term.held for term in kernel.terms[:2]] == [(("q", 0),), (("k", 1),)]


def test_looking_up():
    """Against NumPy, with its gradient, a few rows at a time."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
    h = np.arange(3).reshape(1, 3, 1, 1)
    a = rng.integers(0, 5, (2, 1, 6, 7))
    b = rng.integers(0, 4, (1, 1, 6, 7))
    index = [bias_values.Index(jnp.asarray(i, jnp.int32)) for i in (h, a, b)]
    batch = np.arange(2).reshape(2, 1, 1, 1)
    weight = jnp.asarray(rng.normal(size=(2, 3, 6, 7)), jnp.float32)

    def found(values):
        return jnp.sum(bias_values.look_up(values, index) * weight)

    def wanted(values):
        return jnp.sum(values[batch, h, a, b] * weight)

    one, two = (jax.jit(jax.value_and_grad(f))(values) for f in (found, wanted))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), one, two)


def test_gradients_of_look_ups_add_up_a_piece_at_a_time(monkeypatch):
    """However many entries are looked up."""
    monkeypatch.setattr(bias_values, "AT_ONCE", 32)
    at = jnp.asarray(np.random.default_rng(0).integers(0, 5, 23), jnp.int32)
    values = jnp.asarray(np.arange(10.0).reshape(2, 5), jnp.float32)
    gradient = jax.grad(lambda x: bias_values.take(x, at).sum())(values)
    counts = np.bincount(np.asarray(at), minlength=5)
    np.testing.assert_array_equal(gradient, np.stack([counts, counts]))


def test_axes_of_queries_count_those_that_are_passed():
    """The bare query reads its entry; an expression of it has the true position."""
    x = bias(lambda q, k: weights("a")[q] + weights("b")[q // 2])
    found = nodes.resolved(x.score(1), Problem(4, 9, q_offset=5))
    text = "weights('a')[q] + weights('b')[(q + 1) // 2 + 2]"
    assert nodes.show_score(found) == text
    lowered = nodes.lower(x.score(1), Problem(4, 9, q_offset=5))
    arrays = {"a": jnp.arange(4.0)[None], "b": 10 * jnp.arange(9.0)[None]}
    made = bias_values.values(lowered, Problem(4, 9), arrays)
    np.testing.assert_array_equal(made.q[0], [[[20, 31, 32, 43]]])
