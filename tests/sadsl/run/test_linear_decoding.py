"""Decoding token by token gives the outputs of the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

DOCUMENTS = sa.causal() & sa.segments()
SEQ = 21


def arrays(heads=4, kv_heads=2, dim=6):
    rng = np.random.default_rng(0)
    counts = heads, kv_heads, kv_heads
    return [jnp.asarray(rng.normal(size=(2, SEQ, h, dim)), jnp.float32) for h in counts]


def operands(term):
    rng = np.random.default_rng(1)
    found = {}
    if term.decay == "g":
        found["g"] = -jnp.asarray(rng.exponential(size=(2, SEQ, 2)), "float32")
    if term.kind.segments:
        own = jnp.asarray(np.sort(rng.integers(0, 4, (2, SEQ))))
        found |= {"q_segment_ids": own, "kv_segment_ids": own}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "term",
    [
        sa.linear("phi"),
        sa.linear("identity", (0.5, 0.9, 0.99, 1.0), normalise=False),
        sa.linear("relu", "g", map=DOCUMENTS),
    ],
    ids=str,
)
def test_prefill_and_steps_equal_the_whole(term):
    q, k, v = arrays()
    given = operands(term)
    phi = {"phi": jnp.square} if term.feature_map == "phi" else {}
    whole = sa.attention(q, k, v, term, operands=given | phi)

    @jax.jit
    def step(state, q, k, v, now):
        return sa.linear_step(term, state, q, k, v, now | phi)

    def run(state, start):
        rows = []
        for t in range(start, SEQ):
            now = {name: x[:, t] for name, x in given.items()}
            state, out = step(state, q[:, t], k[:, t], v[:, t], now)
            rows.append(out)
        np.testing.assert_allclose(
            jnp.stack(rows, axis=1), whole[:, start:], rtol=2e-5, atol=2e-5
        )

    heads = 4 if isinstance(term.decay, tuple) else 2
    run(sa.linear_state(term, 2, heads, 6, 6), 0)
    prompt = {name: x[:, :13] for name, x in given.items()}
    run(sa.linear_prefill(term, k[:, :13], v[:, :13], prompt | phi, num_q_heads=4), 13)


def test_a_step_takes_the_scale_of_the_call():
    q, k, v = (x[:, :2] for x in arrays())
    term = sa.delta(0.5)
    whole = sa.attention(q, k, v, term, sm_scale=1.0)
    state = sa.linear_prefill(term, k[:, :1], v[:, :1], num_q_heads=4)
    _, out = sa.linear_step(term, state, q[:, 1], k[:, 1], v[:, 1], sm_scale=1.0)
    np.testing.assert_allclose(out, whole[:, 1], rtol=1e-5, atol=1e-6)


class TestErrors:
    def test_a_map_that_is_not_causal(self):
        with pytest.raises(ValueError, match=r"not causal.*no state can decode it"):
            sa.linear_state(sa.linear(map=sa.full()), 1, 2, 4, 4)

    def test_a_state_of_other_sizes(self):
        q, k, v = (x[:, 0] for x in arrays())
        state = sa.linear_state(sa.linear(), 2, 3, 6, 6)
        with pytest.raises(ValueError, match=r"shape \(2, 3, 6, 6\).*\(2, 2, 6, 6\)"):
            sa.linear_step(sa.linear(), state, q, k, v)

    def test_documents_that_were_not_given(self):
        q, k, v = (x[:, 0] for x in arrays())
        term = sa.linear(map=DOCUMENTS)
        state = sa.linear_state(term, 2, 2, 6, 6)
        with pytest.raises(ValueError, match=r"reads q_segment_ids: pass it"):
            sa.linear_step(term, state, q, k, v)
