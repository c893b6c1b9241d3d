"""Specs of routing attention: as parts of heads, their slots, texts and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import sadsl as sa
from lowering.run_time.slots import add_up, slots_of, take
from sadsl.catalog import routing_transformer
from sadsl.selections import kmeans

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- Parts of heads


def test_heads_are_calls_of_their_own():
    q, k, v = (jnp.asarray(normal(2, 30, h, 8, seed=h)) for h in (6, 3, 3))
    spec = sa.heads((sa.causal(), 2), (sa.softmax(sa.window(3), 5.0), 4))
    assert sa.parse(repr(spec)) == spec
    out, lse = sa.attention(q, k, v, spec, return_lse=True)
    for a, b, part in ((0, 2, spec.shares[0][0]), (2, 6, spec.shares[1][0])):
        kv = slice(a // 2, b // 2)
        mine = q[:, :, a:b], k[:, :, kv], v[:, :, kv], part
        wanted, wanted_lse = sa.attention(*mine, return_lse=True)
        np.testing.assert_array_equal(out[:, :, a:b], wanted)
        np.testing.assert_array_equal(lse[:, a:b], wanted_lse)
    with pytest.raises(ValueError, match="for 5 heads, and q has 6"):
        sa.attention(q, k, v, sa.heads((sa.causal(), 5)))
    with pytest.raises(ValueError, match=r"3 heads .* split a group of 2"):
        sa.attention(q, k, v, sa.heads((sa.causal(), 3), (sa.full(), 3)))
    with pytest.raises(ValueError, match="'x' was given, but no part"):
        sa.attention(q, k, v, spec, operands={"x": jnp.arange(3)})
    with pytest.raises(NotImplementedError, match="more than one softmax"):
        sa.plan(spec, 30)


@pytest.mark.slow
def test_heads_pass_operands_to_the_parts_that_read_them():
    q, v = (jnp.asarray(normal(1, 24, 4, 8, seed=i)) for i in range(2))
    spec = routing_transformer(4, 2, 10, local_window=5)
    operands = {"centroids": normal(2, 2, 8)}
    chosen = sa.select(spec, q, q, operands=operands)
    near, routed = (part for part, _ in spec.shares)
    out = sa.attention(q, q, v, spec, operands=operands)
    wanted = sa.attention(q[:, :, :2], q[:, :, :2], v[:, :, :2], near)
    np.testing.assert_array_equal(out[:, :, :2], wanted)
    rest = q[:, :, 2:], q[:, :, 2:], v[:, :, 2:], routed
    again = sa.attention(*rest, operands=chosen)
    np.testing.assert_array_equal(out[:, :, 2:], again)
    seen = near.dense(12)[0]
    np.testing.assert_array_equal(np.flatnonzero(seen[11]), np.arange(5, 12))
    twice = sa.heads(
        (sa.scatter_mean(kmeans(2, 10)), 2), (sa.scatter_mean(kmeans(2, 10)), 2)
    )
    with pytest.raises(ValueError, match="for two parts"):
        sa.select(twice, q, q, operands=operands)


# ---- Slots


@pytest.mark.slow
def test_slots_and_their_sums_are_each_other_s_gradient():
    position = np.array([[0, 2, 5, 2, 2, 6], [6, 6, 6, 6, 6, 6]])
    slots = slots_of(jnp.asarray(position, jnp.int32), 6)
    x, y = jnp.asarray(normal(2, 6, 3)), jnp.asarray(normal(2, 6, 3, seed=1))
    matrix = (position[:, :, None] == np.arange(6)).astype(np.float64)
    np.testing.assert_allclose(take(x, slots), matrix @ x, atol=1e-6)
    np.testing.assert_allclose(
        add_up(y, slots), np.swapaxes(matrix, 1, 2) @ y, atol=1e-6
    )
    np.testing.assert_array_equal(slots.counts[0], [1, 0, 3, 0, 0, 1])
    # Through both and back again, twice.
    f = jax.jit(lambda x: jnp.sum(add_up(take(x, slots) ** 3, slots) * x))
    check_grads(f, (x,), order=2, modes=["rev"], rtol=2e-2)
    narrow = jax.grad(lambda y: add_up(y, slots).sum())(y.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    assert add_up(y, slots).dtype == jnp.float32


# ---- Texts and refusals


def test_text_is_read_back():
    for spec in (
        routing_transformer(),
        routing_transformer(8, 4, None, variant="lucidrains", num_local=0),
        sa.scatter_mean(sa.causal() & kmeans(3, members="topw", share_qk=False)),
        kmeans(5, members="argmax", centroids="mu", norm="none"),
    ):
        assert sa.parse(repr(spec)) == spec
    assert repr(kmeans(8, 64)) == "kmeans(8, window=64)"
    assert kmeans(8, 64).leak == "all"
    assert kmeans(8, members="argmax").leak == "none"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: kmeans(0), ValueError, "num_clusters=0 must be at least 1"),
        (lambda: kmeans(2, 0), ValueError, "window=0 must be at least 1"),
        (lambda: kmeans(2, members="best"), ValueError, "topw, argmax"),
        (lambda: kmeans(2, norm="l2"), ValueError, "layer, unit, none"),
        (lambda: kmeans(2, 5, "argmax"), ValueError, "leave it None"),
        (lambda: kmeans(2, centroids="a b"), ValueError, "Python identifier"),
        (lambda: kmeans(65).node, NotImplementedError, "use scatter_mean"),
        (lambda: sa.scatter_mean(sa.causal()), ValueError, "it has 0 at the top"),
        (lambda: sa.scatter_mean(kmeans(2) & kmeans(3)), ValueError, "it has 2"),
        (lambda: sa.scatter_mean(kmeans(2) | sa.causal()), ValueError, "it has 0"),
        (
            lambda: sa.scatter_mean(kmeans(2, members="argmax")),
            ValueError,
            "use members='topw'",
        ),
        (
            lambda: sa.scatter_mean(kmeans(2) & ~kmeans(3)),
            NotImplementedError,
            "content decides too",
        ),
        (lambda: sa.scatter_mean(kmeans(2), -1.0), ValueError, "at least 0"),
        (lambda: sa.scatter_mean(kmeans(2), own_key="no"), ValueError, "seen, alone"),
        (
            lambda: sa.scatter_mean(kmeans(2, share_qk=False), own_key="alone"),
            ValueError,
            "needs share_qk=True",
        ),
        (lambda: sa.heads(), ValueError, "at least one"),
        (lambda: sa.heads((sa.causal(), 0)), ValueError, "n=0 must be at least 1"),
        (lambda: sa.heads(sa.causal()), TypeError, "number of heads"),
        (lambda: routing_transformer(variant="x"), ValueError, "'official' or"),
    ],
)
def test_what_cannot_be_made_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_calls_that_do_not_fit_are_refused():
    q = jnp.asarray(normal(1, 12, 2, 8))
    good = {"centroids": normal(2, 3, 8)}

    def refused(error, text, spec, operands=good, **options):
        with pytest.raises(error, match=text):
            sa.attention(q, q, q, sa.scatter_mean(spec), operands=operands, **options)

    refused(ValueError, "window=13 exceeds the 12 positions", kmeans(3, 13))
    refused(ValueError, "needs floats .* here .2, 4, 8.", kmeans(4))
    refused(ValueError, "must have 3 axes", kmeans(3), {"centroids": normal(3, 8)})
    whole = {"centroids": np.zeros((2, 3, 8), np.int32)}
    refused(ValueError, "is int32 of shape", kmeans(3), whole)
    refused(ValueError, "float centroids .* not given", kmeans(3), {})
    refused(NotImplementedError, "more than one normaliser", kmeans(3), return_lse=True)
    term = sa.scatter_mean(kmeans(3))
    with pytest.raises(ValueError, match="and 12 keys: pass share_qk=False"):
        sa.attention(q[:, :5], q, q, term, operands=good)
    alone, half = sa.scatter_mean(kmeans(3), own_key="alone"), q[:, :6]
    with pytest.raises(ValueError, match="takes q_offset=0"):
        sa.attention(q, q, q, alone, operands=good, q_offset=2)
    chosen = sa.select(term, q, q, operands=good)
    with pytest.raises(ValueError, match="as select chooses them"):
        sa.attention(half, half, half, term, operands=chosen)
    # Where there are no queries, nothing has been chosen.
    with pytest.raises(NotImplementedError, match="more than one softmax"):
        sa.plan(sa.scatter_mean(sa.causal() & kmeans(3)), 12)
