"""Linear attention over documents in any order, and in any number of pieces.

What the ids are is known when a call is traced, or it is not; the result is the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from sadsl.run.linear_documents import _between

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

MAP = sa.causal() & sa.segments()
CHUNK = sa.KernelConfig(block_kv=16)
slow = pytest.mark.slow


def arrays(q_seq=24, kv_seq=24, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, q_seq, 4, 5), (2, kv_seq, 2, 5), (2, kv_seq, 2, 6)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def log_decays(kv_seq=24, seed=1, scale=0.3):
    rng = np.random.default_rng(seed)
    return -jnp.asarray(scale * rng.exponential(size=(2, kv_seq, 2)), jnp.float32)


def definition(q, k, v, ids, decay=None, offset=0):
    """Over all pairs, in float64: every query and key of one id, the key not later."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    elu1 = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
    w = np.einsum("bqhd,bkhd->bhqk", elu1(q), elu1(k))
    at, key = offset + np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
    q_ids, kv_ids = (np.broadcast_to(x, (2, np.shape(x)[-1])) for x in ids)
    w *= ((at >= key) & (q_ids[:, :, None] == kv_ids[:, None]))[:, None]
    if decay is not None:
        g = np.repeat(np.asarray(decay, np.float64), 2, axis=2)
        until = np.concatenate([0 * g[:, :1], np.cumsum(g, axis=1)], axis=1)
        steps = until[:, at + 1] - until[:, None, key + 1]
        w *= np.exp(np.minimum(np.moveaxis(steps, 3, 1), 0))
    total = w.sum(axis=3)
    out = np.einsum("bhqk,bkhd->bqhd", w, v)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total + 1e-10), -np.inf)
    return out / (np.swapaxes(total, 1, 2)[..., None] + 1e-10), lse


IDS = st.integers(0, 3) | st.sampled_from([-7, 2**31 - 1])


@st.composite
def documents(draw):
    """Ids of queries and keys, one array or two, and the position of the first query.

    Runs of random ids: documents in pieces, padding at both ends, queries whose
    document is not that of the key beside them.
    """

    def ids(length):
        runs = draw(st.lists(st.tuples(IDS, st.integers(1, 9)), min_size=1, max_size=9))
        row = np.repeat(*map(np.array, zip(*runs, strict=True)))
        return np.resize(row, length)

    if draw(st.booleans()):
        same = np.stack([ids(24), ids(24)])
        return same, same, 0
    q_seq, offset = draw(st.sampled_from([(24, 0), (7, 0), (7, 17), (1, 20)]))
    return np.stack([ids(q_seq)] * 2), np.stack([ids(24), ids(24)]), offset


def call(q, k, v, ids, offset, decay, impl):
    term = sa.linear(decay=None if decay is None else "g", map=MAP)
    return sa.attention(
        q, k, v, term, impl=impl, interpret=impl in ("tpu", "triton"), config=CHUNK,
        q_segment_ids=ids[0], kv_segment_ids=ids[1], q_offset=offset, return_lse=True,
        operands={} if decay is None else {"g": decay},
    )  # fmt: skip


def check(q_ids, kv_ids, offset, decays, impl):
    """The values of one call, with ids that are known and with ids that are traced."""
    q, k, v = arrays(q_ids.shape[1])
    decay = log_decays() if decays else None
    want = definition(q, k, v, (q_ids, kv_ids), decay, offset)

    @jax.jit
    def traced(ids):
        # One array for both where the caller has one.
        pair = (ids, ids) if q_ids is kv_ids else ids
        return call(q, k, v, pair, offset, decay, impl)

    known = call(q, k, v, (q_ids, kv_ids), offset, decay, impl)
    for found in known, traced(q_ids if q_ids is kv_ids else (q_ids, kv_ids)):
        oracle.assert_close(found[0], want[0], "float32")
        oracle.assert_close(found[1], want[1], "float32")


@slow
@settings(max_examples=few(4), phases=(Phase.explicit, Phase.generate))
@given(documents(), st.booleans())
def test_random_documents(ids, decays):
    check(*ids, decays, "xla")


PIECES = np.array([[0] * 3 + [1] * 5 + [2] * 4 + [1] * 6 + [0] * 6,
                   [3] * 9 + [1] * 6 + [3] * 4 + [2] * 5])  # fmt: skip


@pytest.mark.parametrize(
    "impl", ["reference", "tpu", "triton"], ids=lambda impl: f"on {impl}"
)
@pytest.mark.parametrize("one", [True, pytest.param(False, marks=slow)])
def test_pieces(impl, one):
    check(PIECES, PIECES if one else PIECES[::-1].copy(), 0, True, impl)


@pytest.mark.slow
@settings(max_examples=few(150))
@given(documents(), st.booleans(), st.sampled_from(["reference", "xla", "tpu"]))
def test_random_documents_widely(ids, decays, impl):
    check(*ids, decays, impl)


@pytest.mark.slow
@pytest.mark.parametrize("one", [True, False])
def test_gradients(one):
    """Those of the definition, on traced ids of one array or of two."""
    q, k, v = arrays()
    decay = log_decays()
    ids = (PIECES, PIECES if one else PIECES[::-1].copy())

    def loss(x, ids, impl):
        out, lse = call(*x[:3], (ids[0], ids[0] if one else ids[1]), 0, x[3], impl)
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    grad = jax.jit(jax.grad(loss), static_argnums=2)
    found, want = (grad((q, k, v, decay), ids, i) for i in ("xla", "reference"))
    for a, b in zip(found, want, strict=True):
        oracle.assert_close(a, np.asarray(b, np.float64), "float32")


@pytest.mark.slow
def test_vmap_over_ids():
    q, k, v = arrays()
    run = lambda ids: call(q, k, v, (ids, ids + 0), 0, None, "xla")[0]
    many = np.stack([PIECES, np.sort(PIECES)])
    for ids, out in zip(many, jax.vmap(run)(jnp.asarray(many)), strict=True):
        oracle.assert_close(out, definition(q, k, v, (ids, ids))[0], "float32")


def test_steps_between_pieces_are_exact():
    """Far more, and far stronger, than int32 or float32 sums hold."""
    n = 200_000
    rng = np.random.default_rng(0)
    decay = np.stack([-rng.exponential(size=n) * 1e-3, np.full(n, -60.0)])
    at = np.array([[0, 1000, 1001, 150_000, 150_700, n - 1]])
    starts = np.zeros(at.shape, bool)
    found = _between(jnp.asarray(decay[None], jnp.float32), jnp.asarray(at), starts)
    sums = np.cumsum(decay.astype(np.float32).astype(np.float64), axis=1)[:, at[0]]
    want = np.diff(sums, axis=1, prepend=sums[:, :1])
    close = want[0] > -60
    np.testing.assert_allclose(found[0, 0][close], want[0][close], atol=2e-5)
    assert close.sum() > 3
    # exp of what is less is 0 beside the token's own weight.
    assert (np.asarray(found[0, 0][~close]) < -59).all()
    assert (np.asarray(found[0, 1, 1:]) <= -60).all()


class TestDecoding:
    def test_a_prompt_in_pieces(self):
        """Its state is that of the last document, all pieces of it."""
        q, k, v = arrays()
        decay = log_decays()
        ids = np.stack([PIECES[0], PIECES[0]])
        ids[:, 20:] = 1
        term = sa.linear(decay="g", map=MAP)
        want, _ = definition(q, k, v, (ids, ids), decay)

        @jax.jit
        def decoded(ids):
            now = {"g": decay[:, :21], "kv_segment_ids": ids[:, :21]}
            state = sa.linear_prefill(term, k[:, :21], v[:, :21], now, num_q_heads=4)
            for t in range(21, 24):
                own = {"g": decay[:, t]}
                own |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), ids[:, t])
                state, out = sa.linear_step(term, state, q[:, t], k[:, t], v[:, t], own)
            return out

        oracle.assert_close(decoded(ids), want[:, 23], "float32")

    @pytest.mark.slow
    @pytest.mark.parametrize("prefill", [False, True])
    def test_a_document_that_comes_back(self, prefill):
        """Refused where ids are known, NaN where they are not; others go on."""
        q, k, v = arrays()
        term = sa.linear(map=MAP)
        ids = np.array([[5, 5, 2, 5, 5, 9], [5, 5, 2, 2, 9, 9]])
        start = 3 if prefill else 0

        def decoded(ids, stop):
            state = sa.linear_state(term, 2, 2, 5, 6)
            if prefill:
                own = {"kv_segment_ids": ids[:, :start]}
                state = sa.linear_prefill(term, k[:, :start], v[:, :start], own)
            rows = []
            for t in range(start, stop):
                own = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), ids[:, t])
                state, out = sa.linear_step(term, state, q[:, t], k[:, t], v[:, t], own)
                rows.append(out)
            return jnp.stack(rows, axis=1)

        found = np.asarray(jax.jit(decoded, static_argnums=1)(ids, 6))
        want, _ = definition(q[:, :6], k[:, :6], v[:, :6], (ids, ids))
        want = want[:, start:]
        lost = np.zeros((2, 6), bool)
        lost[0, 3:5] = True
        lost = lost[:, start:]
        assert np.isnan(found[lost]).all()
        oracle.assert_close(found[~lost], want[~lost], "float32")
        with pytest.raises(ValueError, match=r"entry 0: document 5 comes back after"):
            decoded(jnp.asarray(ids), 6)

    def test_more_documents_than_a_state_remembers(self):
        q, k, v = (x[:, 0] for x in arrays())
        term = sa.linear(map=MAP)
        step = jax.jit(lambda state, own: sa.linear_step(term, state, q, k, v, own))
        state = sa.linear_state(term, 2, 2, 5, 6)
        for document in range(70):
            ids = jnp.full(2, document)
            own = {"q_segment_ids": ids, "kv_segment_ids": ids}
            state, out = step(state, own)
            assert np.isfinite(out).all()
        for document, comes_back in [(69, False), (6, True), (5, False)]:
            _, out = step(state, dict.fromkeys(own, jnp.full(2, document)))
            assert np.isnan(out).all() == comes_back


@pytest.mark.parametrize("impl", ["reference", "xla", "tpu", "triton"])
def test_traced_log_decays_above_0_are_nan(impl):
    """Known, they are refused."""
    q, k, v = arrays()
    decay = log_decays().at[0, 9, 1].set(0.1)
    run = jax.jit(lambda g: call(q, k, v, (PIECES * 0, PIECES * 0), 0, g, impl)[0])
    out = np.asarray(run(decay))
    assert np.isnan(out[0, 9:, 2:]).all()
    others = out.copy()
    others[0, 9:, 2:] = 0
    want, _ = definition(q, k, v, (PIECES * 0, PIECES * 0), decay)
    want[0, 9:, 2:] = 0
    oracle.assert_close(others, want, "float32")
