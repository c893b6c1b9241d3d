"""The linear term: every map, decay and feature map against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from linear_oracle import (
    CHUNK,
    DOCUMENTS,
    arrays,
    definition,
    elu1_of,
    ids,
    log_decays,
    options,
    pairs_of,
)

import sadsl as sa
from sadsl.terms.features import elu1

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize(
    "map", [sa.causal(), sa.full(), sa.segments(), DOCUMENTS], ids=str
)
def test_maps(map, impl):
    q, k, v = arrays()
    own = ids(20)
    term = sa.linear(map=map)
    out, lse = sa.attention(
        q, k, v, term, impl=impl, config=CHUNK, return_lse=True,
        **options(term, own, own),
    )  # fmt: skip
    want = definition(elu1_of, q, k, v, pairs_of(map, own, own))
    oracle.assert_close(out, want[0], "float32")
    oracle.assert_close(lse, want[1], "float32")


@pytest.mark.parametrize("impl", ["tpu", "triton"])
def test_kernels_with_everything(impl):
    q, k, v = arrays(33, 33)
    own, decay = ids(33), log_decays(33, 2)
    term = sa.linear("relu", "g", map=DOCUMENTS)
    out = sa.attention(
        q, k, v, term, impl=impl, interpret=True, config=CHUNK, operands={"g": decay},
        q_segment_ids=own, kv_segment_ids=own,
    )  # fmt: skip
    pairs = pairs_of(DOCUMENTS, own, own)
    want, _ = definition(lambda x: np.maximum(x, 0), q, k, v, pairs, decay)
    oracle.assert_close(out, want, "float32")


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("decay", [(0.5, 0.9, 0.99, 1.0), "g"])
def test_decays(decay, impl):
    q, k, v = arrays()
    g = log_decays(20, 2) if decay == "g" else None
    given = {} if g is None else {"operands": {"g": g}}
    term = sa.linear("identity", decay, normalise=False)
    out = sa.attention(q, k, v, term, impl=impl, config=CHUNK, **given)
    if g is None:
        g = np.broadcast_to(np.log(np.atleast_1d(decay)), (2, 20, np.size(decay)))
    want, _ = definition(lambda x: x, q, k, v, np.tri(20), g, eps=None)
    oracle.assert_close(out, want, "float32")


class TestLengths:
    @pytest.mark.parametrize(
        ("q_seq", "kv_seq", "offset"),
        [(5, 12, 10), pytest.param(20, 7, 0, marks=pytest.mark.slow)],
    )
    def test_causal(self, q_seq, kv_seq, offset):
        q, k, v = arrays(q_seq, kv_seq)
        g = np.full((2, 60, 1), np.log(0.9))
        for impl in ("xla", "reference"):
            out = sa.attention(
                q, k, v, sa.linear(decay=0.9), q_offset=offset, impl=impl
            )
            pairs = np.arange(kv_seq) <= np.arange(q_seq)[:, None] + offset
            want, _ = definition(elu1_of, q, k, v, pairs, g, offset=offset)
            oracle.assert_close(out, want, "float32")

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("map", [sa.full(), sa.segments()], ids=str)
    def test_cross_attention(self, map):
        """Documents in any order, some of them without keys or without queries."""
        q, k, v = arrays(9, 21)
        q_ids, kv_ids = ids(9, ordered=False), ids(21, ordered=False, seed=5) + 1
        term = sa.linear(map=map)
        given = options(term, q_ids, kv_ids)
        out, lse = sa.attention(q, k, v, term, return_lse=True, **given)
        want = definition(elu1_of, q, k, v, pairs_of(map, q_ids, kv_ids))
        oracle.assert_close(out, want[0], "float32")
        oracle.assert_close(lse, want[1], "float32")
        if term.kind.segments:
            assert np.isneginf(want[1]).any()

    def test_queries_past_the_keys_have_no_decay(self):
        q, k, v = arrays(9, 7)
        given = {"g": log_decays(7, 2)}
        with pytest.raises(ValueError, match=r"position 8 come after the last of 7"):
            sa.attention(q, k, v, sa.linear(decay="g"), operands=given)


class TestGradients:
    @pytest.mark.sample(1)
    @pytest.mark.parametrize(
        "map",
        [sa.full(), pytest.param(sa.segments(), marks=pytest.mark.slow), DOCUMENTS],
        ids=str,
    )
    def test_equal_those_of_the_definition(self, map):
        q, k, v = arrays()
        own, g = ids(20), log_decays(20, 2)
        term = sa.linear(map=map, decay="g" if map == DOCUMENTS else None)
        given = {"g": g} if map == DOCUMENTS else {}

        def loss(arrays, impl):
            *qkv, given = arrays
            out, lse = sa.attention(
                *qkv, term, impl=impl, return_lse=True, operands=given, config=CHUNK,
                **options(term, own, own),
            )  # fmt: skip
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        found = gradient((q, k, v, given), "xla")
        want = gradient((q, k, v, given), "reference")
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            oracle.assert_close(a, np.asarray(b, np.float64), "float32")

    def test_float64(self):
        with jax.enable_x64(True):
            q, k, v = (x.astype(jnp.float64) for x in arrays())
            term = sa.linear(decay=0.7)
            g = np.full((2, 20, 1), np.log(0.7))
            want, _ = definition(elu1_of, q, k, v, np.tri(20), g)
            for impl in ("reference", "xla"):
                out = sa.attention(q, k, v, term, impl=impl)
                np.testing.assert_allclose(out, want, rtol=1e-12)
            with pytest.raises(NotImplementedError, match=r"not float64"):
                sa.attention(q, k, v, term, impl="tpu", interpret=True)


class TestFeatureMaps:
    def test_of_a_flax_module_with_its_gradient(self):
        q, k, v = arrays()
        phi = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
        graph, weights = nnx.split(phi)
        term = sa.linear("phi", normalise=False)

        def value(weights):
            phi = nnx.merge(graph, weights)
            given = {"phi": lambda x: jnp.square(phi(x))}
            return sa.attention(q, k, v, term, operands=given)

        kernel, bias = (np.asarray(x[...], np.float64) for x in (phi.kernel, phi.bias))
        features = lambda x: (x @ kernel + bias) ** 2
        want, _ = definition(features, q, k, v, np.tri(20), eps=None)
        oracle.assert_close(value(weights), want, "float32")
        grads = jax.grad(lambda w: jnp.sum(value(w)))(weights)
        assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(grads))

    def test_a_function_itself(self):
        q, k, v = arrays()
        term = sa.linear(jnp.square)
        want, _ = definition(np.square, q, k, v, np.tri(20))
        oracle.assert_close(sa.attention(q, k, v, term), want, "float32")
        assert term == sa.linear(jnp.square)
        with pytest.raises(NotImplementedError, match=r"no single log-sum-exp"):
            sa.attention(q, k, v, term, return_lse=True)

    def test_negative_features_are_allowed(self):
        q, k, v = arrays()
        out = sa.attention(q, k, v, sa.linear("identity", eps=0.5))
        want, _ = definition(lambda x: x, q, k, v, np.tri(20), eps=0.5)
        # Where weights cancel, the quotient has less than the digits of its parts.
        oracle.assert_close(out, want, "float16")

    def test_elu1_far_below_zero(self):
        x = jnp.asarray([-80.0, -1.0, 0.0, 2.0])
        want = elu1_of(np.asarray(x, np.float64))
        np.testing.assert_allclose(elu1(x), want, rtol=1e-5)

    def test_queries_that_see_nothing(self):
        """Features are all 0: of the queries in one entry, of the keys in another."""
        q, k, v = arrays(8, 8)
        q, k = q.at[0].set(-1), k.at[1].set(-1)

        def f(q, k, v):
            out, lse = sa.attention(q, k, v, sa.linear("relu"), return_lse=True)
            return jnp.sum(jnp.sin(out)), (out, lse)

        grad = jax.grad(f, (0, 1, 2), has_aux=True)
        grads, (out, lse) = jax.jit(grad)(q, k, v)
        assert not out.any()
        assert np.isneginf(lse).all()
        assert not any(x.any() for x in grads)

    def test_not_given(self):
        q, k, v = arrays(4, 4)
        with pytest.raises(ValueError, match=r"function 'phi', which was not given"):
            sa.attention(q, k, v, sa.linear("phi"))
        with pytest.raises(ValueError, match=r"'phi', which is ArrayImpl"):
            sa.attention(q, k, v, sa.linear("phi"), operands={"phi": jnp.ones(3)})

    def test_of_a_wrong_shape(self):
        q, k, v = arrays(4, 4)
        given = {"phi": lambda x: x.sum(axis=1)}
        with pytest.raises(ValueError, match=r"turns q of shape .* into \(2, 4, 6\)"):
            sa.attention(q, k, v, sa.linear("phi"), operands=given)


def test_joint_is_one_normaliser():
    q, k, v = arrays()
    near = sa.causal() & sa.window(5)
    spec = sa.joint(near, sa.linear(), overlap="count")
    out = sa.attention(q, k, v, spec)
    soft = np.einsum(
        "bqhd,bkhd->bhqk", *(np.repeat(np.asarray(x, np.float64), r, 2)
                             for x, r in ((q, 1), (k, 2)))
    ) * 6**-0.5  # fmt: skip
    weights = np.exp(soft) * near.dense(20)
    wide = np.repeat(np.asarray(v, np.float64), 2, 2)
    own, lse = definition(elu1_of, q, k, v, np.tri(20))
    total = np.exp(lse) + weights.sum(axis=3)
    want = np.einsum("bhqk,bkhd->bqhd", weights, wide)
    want += own * np.swapaxes(np.exp(lse), 1, 2)[..., None]
    oracle.assert_close(out, want / np.swapaxes(total, 1, 2)[..., None], "float32")


def test_hybrid_by_heads():
    q, k, v = arrays()
    out = sa.attention(q, k, v, "heads((causal(), 2), (linear('relu', decay=0.9), 2))")
    alone = sa.attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], "linear('relu', 0.9)")
    np.testing.assert_allclose(out[:, :, 2:], alone, rtol=1e-6)
