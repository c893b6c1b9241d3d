"""The linear term as a value, and the arrays that its calls refuse."""

import jax
import jax.numpy as jnp
import pytest
from linear_oracle import DOCUMENTS, arrays, ids

import sadsl as sa
from sadsl.terms.base import LayerSizes

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


class TestTerm:
    @pytest.mark.parametrize(
        "term",
        [
            sa.linear(),
            sa.linear("relu", 0.5, normalise=False),
            sa.linear("phi", (0.5, 1), map=DOCUMENTS, eps=1e-3),
            sa.linear(decay="g", map=sa.where(lambda q, k: k <= q)),
        ],
        ids=str,
    )
    def test_text(self, term):
        assert sa.parse(repr(term)) == term
        assert hash(sa.parse(repr(term))) == hash(term)

    @pytest.mark.parametrize(
        ("map", "causal", "segments"),
        [
            (sa.segments() & sa.causal(), True, True),
            (sa.full() & sa.causal(), True, False),
            (sa.where(lambda q, k: q >= k), True, False),
            (sa.segments() | ~sa.full(), False, True),
        ],
        ids=str,
    )
    def test_the_kind_comes_from_the_expression(self, map, causal, segments):
        kind = sa.linear(map=map).kind
        assert (kind.causal, kind.segments) == (causal, segments)

    def test_another_map(self):
        with pytest.raises(NotImplementedError, match=r"causal\(\) & segments\(\)"):
            assert sa.linear(map=sa.causal() & sa.window(4)).kind

    def test_a_decay_that_is_not_causal(self):
        with pytest.raises(ValueError, match=r"full\(\).*must be causal"):
            sa.linear(decay=0.9, map=sa.full())

    @pytest.mark.parametrize("decay", [0.0, 1.5, -1, (0.5, float("nan"))])
    def test_a_decay_outside_of_its_range(self, decay):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            sa.linear(decay=decay)

    def test_other_mistakes(self):
        with pytest.raises(ValueError, match=r"eps=-1.0 must be"):
            sa.linear(eps=-1)
        with pytest.raises(TypeError, match=r"feature_map=3"):
            sa.linear(3)
        with pytest.raises(ValueError, match=r"'x' names both"):
            sa.linear("x", "x")
        with pytest.raises(ValueError, match=r"one for each head"):
            sa.linear(decay=[[0.5]])

    def test_what_it_reads_and_learns(self):
        term = sa.linear("phi", "g", map=DOCUMENTS)
        names = "phi", "g", "q_segment_ids", "kv_segment_ids", "other"
        assert [term.reads(n) for n in names] == [True] * 4 + [False]
        learned = term.learned(LayerSizes(8, 2, 16, 16))["g"]
        assert learned.shape == (2,)
        assert learned.per_query
        assert learned.squash == "log_sigmoid"
        assert sa.linear(decay=0.9).learned(LayerSizes(8, 2, 16, 16)) == {}


class TestOperands:
    @pytest.mark.parametrize(
        ("g", "message"),
        [
            (None, "reads log-decays from 'g', which was not given"),
            (jnp.zeros((2, 9, 2)), r"shape \(2, 9, 2\).*\[2, 8, heads\]"),
            (jnp.zeros((2, 8, 3)), "decays of 3 heads.*2 heads of k or the 4 of q"),
            (jnp.zeros((2, 8, 2), jnp.int32), "must be of floats"),
            (jnp.full((2, 8, 2), 0.5), "holds 0.5: log-decays must be at most 0"),
        ],
    )
    def test_log_decays(self, g, message):
        q, k, v = arrays(8, 8)
        given = {} if g is None else {"g": g}
        with pytest.raises(ValueError, match=message):
            sa.attention(q, k, v, sa.linear(decay="g"), operands=given)

    @pytest.mark.slow
    def test_queries_of_another_document(self):
        """A query with an id that no key has is padding, and sees nothing."""
        q, k, v = arrays(4, 4, batch=1)
        kv = jnp.asarray([[1, 1, 2, 2]])
        given = {"q_segment_ids": kv.at[0, 3].set(9), "kv_segment_ids": kv}
        out = sa.attention(q, k, v, sa.linear(map=DOCUMENTS), **given)
        assert not out[0, 3].any()
        assert out[0, :3].all()

    def test_segment_ids(self):
        q, k, v = arrays(4, 4)
        term = sa.linear(map=sa.segments())
        with pytest.raises(ValueError, match=r"reads q_segment_ids: pass it"):
            sa.attention(q, k, v, term)
        wrong = {"q_segment_ids": ids(5), "kv_segment_ids": ids(4)}
        with pytest.raises(ValueError, match=r"shape \(2, 5\): it must be \(2, 4\)"):
            sa.attention(q, k, v, term, **wrong)

    def test_dropout(self):
        q, k, v = arrays(4, 4)
        with pytest.raises(NotImplementedError, match=r"no attention weights to drop"):
            sa.attention(
                q, k, v, sa.linear(), dropout_rate=0.5, dropout_key=jax.random.key(0)
            )
