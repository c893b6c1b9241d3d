"""A state that comes in and goes out: parts of a sequence give the whole."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_oracle import DOCUMENTS, arrays, ids, log_decays

import sadsl as sa

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")
SEQ, CUTS = 23, (0, 9, 20, 23)

slow = pytest.mark.slow
IMPLS = ["xla", *(pytest.param(x, marks=slow) for x in ("reference", "tpu", "triton"))]
TERMS = [
    sa.delta("beta", "g"),
    sa.linear(decay="g", map=DOCUMENTS),
    sa.delta("beta", "G", by="channel", map=DOCUMENTS),
    sa.delta("beta", "g", steps=2),
    sa.delta(None, "G", by="channel", erase="a", write="b", normalise_keys=False),
    sa.linear("identity", "G", by="channel", read="before", bonus="u", normalise=False),
    sa.linear("identity", normalise="channel", map=DOCUMENTS),
    sa.linear(sa.cosformer_features(40)),
    sa.linear("taylor", 0.9, scaled=True),
]


def call_of(term):
    """q, k, v and operands of a call."""
    steps = getattr(term, "steps", 1)
    q, k, v = arrays(SEQ, SEQ * steps)
    rng = np.random.default_rng(3)
    g = log_decays(SEQ, 2)
    every = {
        "g": g,
        "G": g[..., None] * jnp.linspace(0, 2, 6)[None, None, None],
        "beta": jnp.asarray(rng.uniform(0, 2, (2, SEQ * steps, 2)), "f"),
        "a": jnp.asarray(0.4 * rng.normal(size=(2, SEQ, 2, 6)), "f"),
        "b": jnp.asarray(0.4 * rng.normal(size=(2, SEQ, 2, 6)), "f"),
        "u": jnp.asarray(rng.normal(size=(2, 6)), "f"),
    }
    given = {name: x for name, x in every.items() if term.reads(name)}
    if term.kind.segments:
        given |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), ids(SEQ))
    return (q, k, v), given


def cut(term, qkv, given, start, stop):
    """The tokens from ``start`` to ``stop`` of a call."""

    def part(x):
        steps = x.shape[1] // SEQ
        return x[:, steps * start : steps * stop]

    return [part(x) for x in qkv], {
        name: x if name == "u" else part(x) for name, x in given.items()
    }


def attention(term, qkv, given, **more):
    operands = {n: x for n, x in given.items() if not n.endswith("segment_ids")}
    own = {n: x for n, x in given.items() if n.endswith("segment_ids")}
    return sa.attention(*qkv, term, operands=operands, **own, **more)


@pytest.mark.sample(1)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("term", TERMS, ids=str)
def test_parts_then_steps_equal_the_whole(term, impl):
    qkv, given = call_of(term)
    more = {"impl": impl, "interpret": impl in ("tpu", "triton")}
    whole = attention(term, qkv, given, **more)
    features = {"taylor": 43}.get(term.feature_map, 6) if hasattr(term, "eps") else 6
    features *= 2 if getattr(term.__dict__.get("feature_map"), "positional", 0) else 1
    state = sa.linear_state(term, 2, 2, features, 6)
    sizes = [x.shape for x in jax.tree.leaves(state)]
    rows = []
    step = jax.jit(partial(sa.linear_step, term))
    for start, stop in pairwise(CUTS[:3]):
        some, now = cut(term, qkv, given, start, stop)
        out, state = attention(term, some, now, state0=state, return_state=True, **more)
        rows.append(out)
    prompt, now = cut(term, qkv, given, 0, CUTS[2])
    after = sa.linear_prefill(term, *prompt[1:], now, num_q_heads=4)
    for a, b in zip(
        jax.tree.leaves(after[:2]), jax.tree.leaves(state[:2]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for t in range(CUTS[2], SEQ):
        (q, k, v), now = cut(term, qkv, given, t, t + 1)
        if getattr(term, "steps", 1) == 1:
            k, v = k[:, 0], v[:, 0]
            now = {n: x if n == "u" else x[:, 0] for n, x in now.items()}
        else:
            now |= {n: now[n][:, 0] for n in now if n == term.decay}
        state, out = step(state, q[:, 0], k, v, now)
        rows.append(out[:, None])
    found = jnp.concatenate(rows, axis=1)
    np.testing.assert_allclose(found, whole, rtol=5e-5, atol=5e-5)
    assert [x.shape for x in jax.tree.leaves(state)] == sizes


@slow
def test_gradients_go_through_states():
    """Those of two halves, of all arrays and the first state, equal those of one."""
    term = sa.delta("beta", "g")
    qkv, given = call_of(term)
    s = jnp.asarray(np.random.default_rng(8).normal(size=(2, 2, 6, 6)), "f")
    start = sa.linear_state(term, 2, 2, 6, 6)._replace(s=s)

    def loss(cuts, qkv, given, state):
        rows = []
        for a, b in pairwise(cuts):
            some, now = cut(term, qkv, given, a, b)
            out, state = attention(term, some, now, state0=state, return_state=True)
            rows.append(out)
        return jnp.sum(jnp.sin(jnp.concatenate(rows, 1))) + jnp.sum(jnp.cos(state.s))

    found, want = (
        jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(cuts, qkv, given, start)
        for cuts in ((0, 11, SEQ), (0, SEQ))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


class TestErrors:
    def state(self, term=None, heads=2, dim=6):
        term = sa.delta(1.0) if term is None else term
        return sa.linear_state(term, 2, heads, dim, 6)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"heads": 4}, r"state has shape \(2, 4, 6, 6\).*here \(2, 2, 6, 6\)"),
            ({"dim": 5}, r"state has shape \(2, 2, 5, 6\)"),
            ({"term": sa.linear()}, r"of another term: its z is not used"),
            ({"term": sa.delta(1.0, map=DOCUMENTS)}, r"its documents is not used"),
        ],
    )
    def test_of_another_spec(self, state, message):
        q, k, v = arrays()
        with pytest.raises(ValueError, match=message):
            sa.attention(q, k, v, sa.delta(1.0), state0=self.state(**state))

    def test_of_another_dtype(self):
        q, k, v = arrays()
        state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.state())
        with pytest.raises(ValueError, match=r"dtype bfloat16: it must be float32"):
            sa.attention(q, k, v, sa.delta(1.0), state0=state)
        with pytest.raises(TypeError, match=r"state0 is ArrayImpl"):
            sa.attention(q, k, v, sa.delta(1.0), state0=state.s)

    def test_terms_without_a_state(self):
        q, k, v = arrays()
        for spec in (sa.causal(), sa.gated(sa.causal(), sa.linear())):
            with pytest.raises(NotImplementedError, match=r"only linear\(...\) and"):
                sa.attention(q, k, v, spec, return_state=True)

    def test_calls_without_a_state(self):
        q, k, v = arrays()
        with pytest.raises(ValueError, match=r"not causal.*has no state"):
            sa.attention(q, k, v, sa.delta(1.0, map=sa.full()), return_state=True)
        with pytest.raises(ValueError, match=r"5 queries from position 0 and 20 keys"):
            sa.attention(q[:, :5], k, v, sa.delta(1.0), return_state=True)

    def test_a_document_that_comes_back(self):
        q, k, v = arrays(4, 4)
        term = sa.delta(1.0, map=DOCUMENTS)
        call = lambda own, **more: sa.attention(
            q, k, v, term, q_segment_ids=own, kv_segment_ids=own, **more
        )
        first = jnp.asarray([[1, 1, 2, 2]] * 2)
        _, state = call(first, return_state=True)
        later = jnp.asarray([[2, 3, 3, 3], [2, 2, 1, 1]])
        with pytest.raises(ValueError, match=r"entry 1: document 1 comes back"):
            call(later, state0=state)
        out = jax.jit(lambda own: call(own, state0=state))(later)
        assert np.isfinite(out[0]).all()
        assert np.isfinite(out[1, :2]).all()
        assert np.isnan(out[1, 2:]).all()
