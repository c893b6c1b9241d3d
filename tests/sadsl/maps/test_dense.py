"""``dense_map``: arrays of bools as maps, by runs and by bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import ir
from sadsl.maps import dense
from sadsl.maps.dense import dense_map

DRAW = np.random.default_rng(0)
BAND = np.tri(130, 130, 3, dtype=bool) & ~np.tri(130, 130, -40, dtype=bool)
ARRAYS = {
    "band": BAND,
    "columns": np.repeat(DRAW.random((37, 3)) < 0.4, 40, axis=1).T,
    "scattered": DRAW.random((37, 130)) < 0.3,
    "blocks": np.kron(DRAW.random((15, 15)) < 0.5, np.ones((12, 12))) == 1,
    "empty": np.zeros((5, 7), bool),
    "all": np.ones((1, 13), bool),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_map_has_the_pairs_of_the_array(name):
    array = ARRAYS[name]
    spec = dense_map(array)
    np.testing.assert_array_equal(spec.dense(*array.shape)[0], array)
    np.testing.assert_array_equal(sa.parse(repr(spec)).dense(*array.shape)[0], array)
    assert sa.plan(spec, *array.shape).num_pairs == array.sum()


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        pytest.param("columns", "xla", marks=pytest.mark.slow),
        ("scattered", "xla"),
        pytest.param("scattered", "tpu", marks=pytest.mark.slow),
    ],
)
def test_attention_over_an_array(name, impl):
    array = ARRAYS[name]
    q, kv = array.shape
    draw = np.random.default_rng(1)
    args = [jnp.asarray(draw.normal(size=(1, n, 1, 8)), "float32") for n in (q, kv, kv)]

    def loss(impl, *args):
        out = sa.attention(*args, dense_map(array), impl=impl, interpret=impl == "tpu")
        return jnp.sin(out).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (1, 2, 3), has_aux=True)(impl, *args)
    (_, wanted), true = jax.value_and_grad(loss, (1, 2, 3), has_aux=True)(
        "reference", *args
    )
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    for got, want in zip(grads, true, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_only_live_blocks_of_bits_are_visited():
    plan = sa.plan(dense_map(ARRAYS["blocks"]), 180, block_q=12, block_kv=12)
    visited = plan.num_full + plan.num_partial
    assert visited == ARRAYS["blocks"][::12, ::12].sum()


def test_equal_rows_and_columns_share_their_bits():
    tables = {
        n for n in ir.walk(dense_map(ARRAYS["blocks"]).node) if isinstance(n, ir.Table)
    }
    assert max(len(table.values) for table in tables) == 15 * 15


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match="bools, not ndarray of dtype float64"):
        dense_map(np.ones((2, 2)))
    with pytest.raises(TypeError, match=r"is an operand"):
        dense_map(jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"not one of shape \(2,\)"):
        dense_map(np.ones(2, bool))
    with pytest.raises(ValueError, match="which runs from 0 to 5"):
        sa.plan(dense_map(np.eye(4, dtype=bool)), 6, 4)
    monkeypatch.setattr(dense, "MOST_ENTRIES", 100)
    with pytest.raises(ValueError, match=r"shape \(37, 130\) has more than 4 runs"):
        dense_map(ARRAYS["scattered"])
