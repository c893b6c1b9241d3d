"""The offline search for the pattern of every head."""

import jax
import numpy as np
import oracle
import pytest
from estimates import SCALE, by_head, pairs_of, sample

import sadsl as sa
from sadsl import catalog
from sadsl.analysis.head_search import Sample, fit_size, search_heads, search_in_order
from sadsl.maps.named import Window
from sadsl.selections import modalities, vertical_slash


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Selections at these sizes take far longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Slow(Sample):
    """What a sample says, in NumPy."""

    def num_pairs(self, spec):
        return pairs_of(spec, self.q, self.k).sum(axis=(1, 2))

    def run(self, spec):
        logits = np.stack([q @ k.T * SCALE for q, k in by_head(self.q, self.k)])
        weight = np.where(pairs_of(spec, self.q, self.k), np.exp(logits), 0)
        total = weight.sum(axis=2)
        out = weight @ np.moveaxis(self.v[0].astype(float), 1, 0)
        out = np.where(
            total[..., None] > 0, out / np.maximum(total, 1e-300)[..., None], 0
        )
        with np.errstate(divide="ignore"):
            return np.moveaxis(out, 0, 1)[None], np.log(total)[None]


def heads_of_two_kinds():
    """Head 0 looks at the first three keys, head 1 at its neighbours."""
    n = 40
    q, k, v = sample(n, heads=2, kv_heads=2, seed=6)
    q[:, :, 0, 0], k[:, :, 0, 0], k[:, :3, 0, 0] = 6, -4, 4
    angle = np.arange(n) / 4
    near = 9 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    q[0, :, 1, :2] = k[0, :, 1, :2] = near
    return q, k, v


FIRST = vertical_slash(4, 0, last=3, forced_columns=0, forced_slashes=0)
LOCAL = sa.causal() & sa.window(5)


@pytest.mark.slow
def test_a_sample_runs_and_counts_pairs():
    arrays = heads_of_two_kinds()
    fast, slow = Sample(*arrays), Slow(*arrays)
    for x, y in zip(fast.run(FIRST), slow.run(FIRST), strict=True):
        oracle.assert_close(x, y, "float32")
    np.testing.assert_array_equal(fast.num_pairs(FIRST), slow.num_pairs(FIRST))
    label = np.arange(40) // 20
    with_labels = Sample(*arrays, operands={"modality": label, "start": label})
    reads = sa.where(lambda q, k: sa.operand("start")[q] <= k) & modalities(0)
    assert sorted(with_labels.read_by(reads)) == ["modality", "start"]
    assert not with_labels.read_by(FIRST)


def test_the_greatest_size_for_some_work():
    n = 40
    there = Slow(*sample(n))
    make = lambda size: sa.causal() & sa.window(size - 1)
    count = lambda size: size * (size + 1) // 2 + (n - size) * size
    for size in (1, 7, 40):
        assert fit_size(make, there, count(size)) == size
        assert fit_size(make, there, count(size) - 0.5) == max(size - 1, 1)


def test_every_head_gets_the_candidate_that_suits_it():
    there = Slow(*heads_of_two_kinds())
    logits = np.stack([q @ k.T * SCALE for q, k in by_head(there.q, there.k)])
    weight = np.where(np.tril(np.ones((40, 40), bool)), np.exp(logits), 0)
    weight /= weight.sum(axis=2, keepdims=True)
    dense = weight @ np.moveaxis(there.v[0].astype(float), 1, 0)
    expected = {by: np.zeros((2, 2)) for by in ("output", "recall", "mismatch")}
    recall, span = np.zeros((2, 2)), slice(5, 30)
    for c, spec in enumerate((FIRST, LOCAL)):
        kept = np.where(pairs_of(spec, there.q, there.k), weight, 0)
        difference = np.moveaxis(there.run(spec)[0][0], 1, 0) - dense
        expected["output"][c] = np.sqrt((difference**2).sum(axis=(1, 2)))
        expected["mismatch"][c] = (abs(difference) > 5e-3).sum(axis=(1, 2))
        expected["recall"][c] = kept.sum(axis=2).mean(axis=1)
        inside = weight[:, span, span].sum(axis=(1, 2))
        recall[c] = kept[:, span, span].sum(axis=(1, 2)) / inside
    for by, numbers in expected.items():
        one = search_heads(there, [FIRST, LOCAL], by=by)
        np.testing.assert_allclose(one.measured, numbers, rtol=1e-9)
        assert one.chosen == (0, 1), by
        assert one.spec == sa.per_head(FIRST, LOCAL)
    one = search_in_order(there, [LOCAL, FIRST, LOCAL], span=(5, 30))
    np.testing.assert_allclose(one.measured, recall[[1, 0, 1]], rtol=1e-9)
    assert one.chosen[1] == 0
    assert (recall[1] > recall[0]).all()


class Told(Sample):
    """Keeps a thousandth for each key of a window."""

    def run(self, spec):
        left = [m.left for m in (getattr(spec, "a", spec),) if isinstance(m, Window)]
        kept = left[0] / 1000 if left else 1.0
        return np.zeros(()), np.full((1, 2, 13), np.log(kept))


def test_a_gain_counts_from_what_was_taken_before():
    there = Told(*sample(13))
    candidates = [sa.window(w) for w in (500, 505, 512, 521, 400)]
    found = search_in_order(there, candidates, span=(2, 9))
    np.testing.assert_allclose(found.measured[:, 0], [0.5, 0.505, 0.512, 0.521, 0.4])
    assert found.chosen == (2, 2)
    assert search_in_order(there, candidates, span=(2, 9), gain=0).chosen == (3, 3)


def test_a_search_refuses_what_it_cannot_do():
    there = Sample(*sample(13))
    with pytest.raises(ValueError, match="give at least one map"):
        search_heads(there, [])
    with pytest.raises(ValueError, match="by='loss' must be"):
        search_heads(there, [sa.causal()], by="loss")
    with pytest.raises(ValueError, match=r"span=\(3, 14\) must be"):
        search_in_order(there, [sa.causal()], span=(3, 14))
    assert len(catalog.mminference_candidates((2, 90), 16, 4)) == 15
    assert len(catalog.minference_candidates()) == 5
