"""The delta term: maps, heads, steps and vectors against its definition in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from linear_oracle import CHUNK, DOCUMENTS, arrays, ids, log_decays, options, pairs_of

import sadsl as sa
from sadsl.terms.base import LayerSizes

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")
MAPS = [sa.causal(), sa.full(), sa.segments(), DOCUMENTS]


def betas(seq, heads=2, seed=4, batch=2):
    found = np.random.default_rng(seed).uniform(0, 2, (batch, seq, heads))
    return jnp.asarray(found, "float32")


def vectors(seq, heads=2, dim=6, seed=5, batch=2):
    found = np.random.default_rng(seed).normal(size=(batch, seq, heads, dim))
    return jnp.asarray(0.4 * found, "float32")


def by_heads(x, heads):
    x = np.asarray(x, np.float64)
    return np.repeat(x, heads // x.shape[2], axis=2)


def definition(q, k, v, pairs, *, beta=1.0, decay=None, erase=None, unit=True, at=None):
    """For each query, a loop over the keys that it sees, in NumPy's float64.

    ``at`` are the positions of the queries, and decays are of positions.
    """
    heads = max(x.shape[2] for x in (q, k, v))
    q, k, v = (by_heads(x, heads) for x in (q, k, v))
    if unit:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    beta = beta if isinstance(beta, float) else by_heads(beta[..., None], heads)
    erase = k if erase is None else by_heads(erase, heads)
    at = np.arange(q.shape[1]) if at is None else at
    seq = max(at.max() + 1, k.shape[1])
    g = np.zeros((1, seq, heads, 1))
    if decay is not None:
        g = by_heads(decay if decay.ndim == 4 else decay[..., None], heads)
    erase, v = beta * erase, beta * v
    pairs = np.broadcast_to(pairs, (q.shape[0], 1, q.shape[1], k.shape[1]))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i in np.ndindex(*q.shape[:2]):
        s, last = np.zeros((heads, k.shape[-1], v.shape[-1])), 0
        for j in np.flatnonzero(pairs[b, 0, i]):
            s = s * np.exp(g[b % len(g), last + 1 : j + 1].sum(0))[..., None]
            u = v[b, j] - np.einsum("hd,hdv->hv", erase[b, j], s)
            s, last = s + k[b, j][..., None] * u[:, None], j
        s = s * np.exp(g[b % len(g), last + 1 : at[i] + 1].sum(0))[..., None]
        out[b, i] = np.einsum("hd,hdv->hv", q[b, i], s)
    return out * q.shape[-1] ** -0.5


@pytest.mark.sample(4)
@pytest.mark.parametrize("impl", ["reference", "xla", "tpu", "triton"])
@pytest.mark.parametrize("by", ["head", "channel"])
@pytest.mark.parametrize("map", MAPS, ids=str)
def test_maps(map, by, impl):
    """Documents in any order and in pieces; some have no keys, some no queries."""
    q, k, v = arrays(19, 19)
    term = sa.delta(map=map)
    given, g = {"beta": betas(19)}, None
    if term.kind.causal:
        g = log_decays(19, 2)
        g = (
            g
            if by == "head"
            else g[..., None] * jnp.linspace(0, 2, 6)[None, None, None]
        )
        term, given = sa.delta("beta", "g", by=by, map=map), given | {"g": g}
    q_ids, kv_ids = ids(19, ordered=False), ids(19, ordered=False, seed=5)
    out = sa.attention(
        q, k, v, term, impl=impl, interpret=impl in ("tpu", "triton"), config=CHUNK,
        operands=given, **options(term, q_ids, kv_ids),
    )  # fmt: skip
    pairs = pairs_of(map, q_ids, kv_ids)
    want = definition(q, k, v, pairs, beta=given["beta"], decay=g)
    oracle.assert_close(out, want, "float32")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("q_seq", "kv_seq", "offset"), [(5, 12, 10), (20, 7, 0)])
def test_lengths(q_seq, kv_seq, offset):
    q, k, v = arrays(q_seq, kv_seq)
    out = sa.attention(q, k, v, sa.delta(0.7, 0.9), q_offset=offset)
    at = offset + np.arange(q_seq)
    pairs = np.arange(kv_seq) <= at[:, None]
    g = np.full((1, 60, 1), np.log(0.9))
    want = definition(q, k, v, pairs, beta=0.7, decay=g, at=at)
    oracle.assert_close(out, want, "float32")


class TestHeads:
    def test_more_values_than_keys(self):
        q, k, _ = arrays(heads=2)
        v = arrays(heads=6, kv_heads=6)[0]
        beta, g = betas(20, 6), log_decays(20, 2)
        given = {"beta": beta, "g": g}
        out = sa.attention(q, k, v, sa.delta(decay="g"), operands=given)
        want = definition(q, k, v, np.tri(20), beta=beta, decay=g)
        oracle.assert_close(out, want, "float32")

    @pytest.mark.slow
    def test_of_a_linear_term(self):
        q, k, _ = arrays(heads=2)
        v = arrays(heads=4, kv_heads=4)[0]
        for impl in ("reference", "xla"):
            out = sa.attention(q, k, v, sa.linear(), impl=impl)
            wide_k, wide_q = (jnp.repeat(x, 2, axis=2) for x in (k, q))
            want = sa.attention(wide_q, wide_k, v, sa.linear(), impl="reference")
            oracle.assert_close(out, np.float64(want), "float32")

    @pytest.mark.parametrize(
        ("heads", "kv", "of_v", "message"),
        [
            (4, 2, 3, r"v has 3 heads, q has 4, k has 2.*multiple of those of k"),
            (4, 2, 6, r"v has 6 heads, q has 4, k has 2"),
        ],
    )
    def test_that_do_not_fit(self, heads, kv, of_v, message):
        q, k, _ = arrays(heads=heads, kv_heads=kv)
        v = arrays(heads=of_v, kv_heads=of_v)[0]
        with pytest.raises(ValueError, match=message):
            sa.attention(q, k, v, sa.delta(1.0))

    def test_of_a_softmax_stay_equal(self):
        q, k, _ = arrays()
        with pytest.raises(ValueError, match=r"v has shape .*\(2, 20, 2\)"):
            sa.attention(q, k, arrays(heads=4, kv_heads=4)[0], sa.causal())


class TestSteps:
    @pytest.mark.sample(1)
    @pytest.mark.parametrize("impl", ["reference", "xla", "tpu"])
    def test_three_keys_a_token(self, impl):
        """Documents in pieces; decay once a token, before its first key."""
        q, _, _ = arrays(9)
        _, k, v = arrays(9, 27)
        own, g, beta = ids(9, ordered=False), log_decays(9, 2), betas(27)
        term = sa.delta(decay="g", steps=3, map=DOCUMENTS)
        kv_ids = jnp.repeat(own, 3, axis=1)
        out = sa.attention(
            q, k, v, term, operands={"g": g, "beta": beta}, impl=impl, config=CHUNK,
            interpret=impl == "tpu", **options(term, own, kv_ids),
        )  # fmt: skip
        spread = np.zeros((2, 27, 2))
        spread[:, ::3] = g
        at = 3 * np.arange(9) + 2
        seen = np.asarray(own)[:, :, None] == np.asarray(kv_ids)[:, None]
        seen = (seen & (np.arange(27) <= at[:, None]))[:, None]
        want = definition(q, k, v, seen, beta=beta, decay=spread, at=at)
        oracle.assert_close(out, want, "float32")

    def test_a_wrong_length(self):
        q, k, v = arrays(9, 18)
        with pytest.raises(ValueError, match=r"9 tokens and k has 18.*3 keys for each"):
            sa.attention(q, k, v, sa.delta(1.0, steps=3))


class TestVectors:
    def test_another_erase_vector(self):
        q, k, v = arrays()
        p = vectors(20)
        term = sa.delta(0.8, 0.9, erase="p", normalise_keys=False)
        out = sa.attention(q, k, v, term, operands={"p": p})
        g = np.full((1, 20, 1), np.log(0.9))
        want = definition(q, k, v, np.tri(20), beta=0.8, decay=g, erase=p, unit=False)
        oracle.assert_close(out, want, "float32")

    TERM = sa.delta(
        None, "g", by="head", erase="a", write="b", map=DOCUMENTS, normalise_keys=False
    )

    def general(self, own, impl="xla"):
        q, k, v = arrays()
        given = {"a": vectors(20), "b": vectors(20, seed=6), "g": log_decays(20, 2)}
        out = sa.attention(
            q,
            k,
            v,
            self.TERM,
            operands=given,
            impl=impl,
            **options(self.TERM, own, own),
        )
        return out, (q, k, v, given)

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("impl", ["xla", "reference"])
    def test_the_general_step(self, impl):
        own = ids(20)
        out, (q, k, v, given) = self.general(own, impl)
        q, k, v, a, b = (by_heads(x, 4) for x in (q, k, v, given["a"], given["b"]))
        g, own = by_heads(given["g"], 4), np.asarray(own)
        want = np.zeros((*q.shape[:3], v.shape[-1]))
        for e in range(2):
            s = np.zeros((4, 6, 6))
            for t in range(20):
                s = s * (t > 0 and own[e, t] == own[e, t - 1])
                read = np.einsum("hd,hdv->hv", a[e, t], s)
                s = (
                    s * np.exp(g[e, t])[:, None, None]
                    + b[e, t][..., None] * read[:, None]
                )
                s = s + k[e, t][..., None] * v[e, t][:, None]
                want[e, t] = np.einsum("hd,hdv->hv", q[e, t], s) * 6**-0.5
        oracle.assert_close(out, want, "float32")

    def test_it_needs_documents_in_one_piece(self):
        with pytest.raises(ValueError, match=r"in several pieces.*sort the tokens"):
            self.general(ids(20, ordered=False))
        mixed = ids(20).at[1].set(ids(20, ordered=False)[1])
        out = jax.jit(lambda own: self.general(own)[0])(mixed)
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype, impl):
    q, k, v = (x.astype(dtype) for x in arrays(33, 33))
    given = {"beta": betas(33), "g": log_decays(33, 2)}
    out = sa.attention(
        q, k, v, sa.delta(decay="g"), operands=given, impl=impl,
        interpret=impl != "xla", config=CHUNK,
    )  # fmt: skip
    assert out.dtype == dtype
    want = definition(q, k, v, np.tri(33), beta=given["beta"], decay=given["g"])
    oracle.assert_close(out, want, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("map", MAPS, ids=str)
def test_gradients_equal_those_of_the_definition(map):
    q, k, v = arrays(17, 17)
    own = ids(17, ordered=False)
    term = sa.delta(decay="g" if sa.delta(map=map).kind.causal else None, map=map)
    given = {"beta": betas(17)} | ({"g": log_decays(17, 2)} if term.decay else {})

    def loss(impl, *args):
        *qkv, given = args
        out = sa.attention(
            *qkv, term, impl=impl, operands=given, config=CHUNK, sm_scale=0.3,
            **options(term, own, own),
        )  # fmt: skip
        return jnp.sum(jnp.sin(out))

    found, want = (
        jax.jit(jax.grad(partial(loss, impl), (0, 1, 2, 3)))(q, k, v, given)
        for impl in ("xla", "reference")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0
        oracle.assert_close(a, np.asarray(b, np.float64), "float32")


class TestTerm:
    def test_what_it_reads_and_learns(self):
        term = sa.delta("b", "g", by="channel", erase="p", map=DOCUMENTS)
        names = "b", "g", "p", "k", "q_segment_ids", "other"
        assert [term.reads(n) for n in names] == [True] * 3 + [False, True, False]
        learned = term.learned(LayerSizes(8, 2, 16, 16))
        assert {n: x.shape for n, x in learned.items()} == {
            "b": (2,), "g": (2, 16), "p": (2, 16)
        }  # fmt: skip
        assert learned["b"].squash == "sigmoid"
        assert term.support is None

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"beta": 2.5}, r"beta=2.5 must be in \[0, 2\]"),
            ({"beta": "not a name"}, r"beta='not a name' must be None, a number or"),
            ({"decay": 1.5}, r"decay=1.5 must be in \(0, 1\]"),
            ({"decay": 0.9, "map": sa.full()}, r"must be causal"),
            ({"decay": 0.9, "by": "channel"}, r"by channel are an operand"),
            ({"by": "row"}, r"by='row' must be one of"),
            ({"steps": 0}, r"steps=0 must be"),
            ({"write": "b"}, r"name both, with beta=None and steps=1"),
            ({"beta": "x", "decay": "x"}, r"'x' names two operands"),
        ],
    )
    def test_mistakes(self, args, message):
        with pytest.raises(ValueError, match=message):
            sa.delta(**args)

    def test_no_lse_and_no_part_of_joint(self):
        q, k, v = arrays(8, 8)
        with pytest.raises(NotImplementedError, match=r"no single log-sum-exp"):
            sa.attention(q, k, v, sa.delta(1.0), return_lse=True)
        with pytest.raises((ValueError, NotImplementedError), match="delta"):
            sa.attention(q, k, v, sa.joint(sa.causal(), sa.delta(1.0)))


class TestOperands:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, r"reads betas from 'beta', which was not given.*\[2, 8, heads\]"),
            ({"beta": jnp.ones((2, 9, 2))}, r"betas must be \[2, 8, heads\]"),
            ({"beta": jnp.ones((2, 8, 3))}, r"betas of 3 heads"),
            ({"beta": jnp.ones((2, 8, 2), int)}, r"must be of floats"),
            ({"beta": jnp.full((2, 8, 2), 2.5)}, r"holds 2.5: betas must be in \[0, 2"),
        ],
    )
    def test_betas(self, given, message):
        q, k, v = arrays(8, 8)
        with pytest.raises(ValueError, match=message):
            sa.attention(q, k, v, sa.delta(), operands=given)

    def test_log_decays_by_channel(self):
        q, k, v = arrays(8, 8)
        term = sa.delta(1.0, "g", by="channel")
        with pytest.raises(ValueError, match=r"log-decays must be \[2, 8, heads, 6\]"):
            sa.attention(q, k, v, term, operands={"g": log_decays(8, 2)})

    def test_dropout(self):
        q, k, v = arrays(4, 4)
        with pytest.raises(NotImplementedError, match=r"no attention weights to drop"):
            sa.attention(
                q, k, v, sa.delta(1.0), dropout_rate=0.5, dropout_key=jax.random.key(0)
            )


class TestHybrids:
    @pytest.mark.slow
    def test_gated(self):
        q, k, v = arrays()
        near, own = sa.causal() & sa.window(5), sa.delta(0.9)
        gates = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 20, 4, 2)), "f")
        out = sa.attention(q, k, v, sa.gated(near, own), operands={"gates": gates})
        want = sum(
            gates[..., i, None] * sa.attention(q, k, v, part)
            for i, part in enumerate((near, own))
        )
        np.testing.assert_allclose(out, want, atol=2e-6)

    def test_heads(self):
        q, k, v = arrays()
        out = sa.attention(q, k, v, "heads((causal(), 2), (delta(1.0, decay=0.9), 2))")
        alone = sa.attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], sa.delta(1.0, 0.9))
        np.testing.assert_allclose(out[:, :, 2:], alone, rtol=1e-5, atol=1e-6)
