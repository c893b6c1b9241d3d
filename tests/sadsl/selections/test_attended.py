"""``attended``: cells by the attention to pooled keys, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.selections import attended, scored

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

HEADS, KV_HEADS, DIM = 4, 2, 6
LISTS, BITS = sa.KernelConfig(lists=True), sa.KernelConfig(lists=False)


def qk(n, kv=None, batch=2):
    rng = np.random.default_rng(n)
    shapes = (batch, n, HEADS, DIM), (batch, kv or n, KV_HEADS, DIM)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def scores_by_loops(q, k, sizes, block, block_q=1, pooled=None, q_offset=0):
    """``[batch, heads, rows, cells]``, by the words of the docstring."""
    length, stride = sizes
    batch, n, kv = len(q), q.shape[1], k.shape[1]
    starts = [s for s in range(0, kv, stride) if s + length <= kv]
    if pooled is None:
        means = [k[:, s : s + length].astype(float).mean(axis=1) for s in starts]
        pooled = np.stack(means, axis=1) if means else np.zeros((batch, 0))
    found = np.zeros((batch, HEADS, -(-n // block_q), -(-kv // block)))
    for b, h, i in np.ndindex(batch, HEADS, n):
        seen = [j for j, s in enumerate(starts) if s + length - 1 <= i + q_offset]
        logits = [q[b, i, h] @ pooled[b, j, h // 2] * DIM**-0.5 for j in seen]
        weights = np.exp(logits) / np.exp(logits).sum()
        row = i // block_q
        queries = min(block_q, n - row * block_q)
        for j, p in zip(seen, weights, strict=True):
            for position in range(starts[j], starts[j] + length):
                found[b, h, row, position // block] += p / stride / queries
    return found


def best(scores, k, last, block):
    """The ``k`` greatest cells of each row that start by its last query."""
    found = np.zeros(scores.shape, bool)
    for at in np.ndindex(scores.shape[:-1]):
        count = min(last(at[-1]) // block + 1, scores.shape[-1])
        order = np.argsort(-scores[at][:count], kind="stable")
        found[at][order[:k]] = True
    return found


SIZES = [
    (37, (6, 4), 8, 1), (37, (4, 4), 4, 1), (130, (8, 2), 8, 3), (37, (3, 5), 10, 1),
    (13, (16, 4), 4, 1),
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize(("n", "sizes", "block", "block_q"), SIZES)
def test_scores_of_cells(n, sizes, block, block_q):
    q, k = qk(n)
    wanted = scores_by_loops(q, k, sizes, block, block_q)
    spec = sa.threshold(0.2, block=block, block_q=block_q, score=attended(*sizes))
    (found,) = sa.select(spec, q, k).values()
    clear = np.abs(wanted - 0.2) > 1e-5
    np.testing.assert_array_equal(found[clear], (wanted > 0.2)[clear])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "query", "shared"])
def test_lists_and_bits_choose_alike(scope):
    """Pooled keys of a caller, for queries at an offset."""
    q, k = qk(13, 37)
    pooled = np.random.default_rng(1).normal(size=(2, 8, KV_HEADS, DIM))
    pooled = pooled.astype(np.float32)
    score = attended(6, 4, keys="short_k")
    spec = sa.causal() & sa.topk(
        3, block=8, block_q=1, score=score, scope=scope, eligible=sa.causal()
    )
    given = {"short_k": pooled}
    scores = scores_by_loops(q, k, (6, 4), 8, 1, pooled, q_offset=24)
    size = {"group": 2, "query": 1, "shared": 4}[scope]
    scores = scores.reshape(2, -1, size, 13, 5).mean(axis=2)
    wanted = best(scores, 3, lambda i: i + 24, 8)
    (bits,) = sa.select(spec, q, k, operands=given, q_offset=24).values()
    bits = np.asarray(bits).reshape(2, -1, 13, 5)
    each = bits.shape[1] // wanted.shape[1]
    np.testing.assert_array_equal(bits, np.repeat(wanted, each, axis=1))
    made = sa.select(spec, q, k, operands=given, q_offset=24, lists=True)
    (lists,) = made.values()
    held = (np.asarray(lists)[..., None] == np.arange(5)).any(axis=-2)
    np.testing.assert_array_equal(held, wanted)
    outs = [
        sa.attention(q, k, k, spec, operands=given, q_offset=24, config=c)
        for c in (LISTS, BITS)
    ]
    np.testing.assert_allclose(*outs, atol=1e-6)


def test_keys_that_are_not_finite_lose_their_own_cells():
    q, k = qk(37)
    clean = scores_by_loops(q, k, (4, 4), 4)
    k[:, 9, 0] = np.nan
    spec = sa.causal() & sa.topk(
        12, block=4, block_q=1, score=attended(4, 4), eligible=sa.causal()
    )
    (found,) = sa.select(spec, q, k).values()
    past = np.arange(37)[:, None] >= 11
    assert clean[:, :2, 11:, 2].all()
    assert not (np.asarray(found)[:, :2, :, 2:3] & past).any()
    assert np.asarray(found)[:, 2:, 11:, 2].all()
    assert np.asarray(found)[:, :, 20:, 3].all()


def test_an_operand_of_wrong_shape_is_refused():
    q, k = qk(37)
    spec = sa.topk(2, block=8, block_q=1, score=attended(6, 4, keys="short_k"))
    with pytest.raises(ValueError, match=r"'short_k'.*key for each whole window of 37"):
        sa.select(spec, q, k, operands={"short_k": np.zeros((2, 9, KV_HEADS, DIM))})
    short = np.zeros((8, KV_HEADS, DIM), np.int32)
    with pytest.raises(ValueError, match="dtype int32: it must be of floats"):
        sa.select(spec, q, k, operands={"short_k": short})
    with pytest.raises(ValueError, match="the map reads 'short_k', pooled keys"):
        sa.select(spec, q, k)


def test_cells_that_the_stride_does_not_divide_are_refused():
    spec = sa.topk(2, block=6, block_q=1, score=attended(8, 4))
    with pytest.raises(ValueError, match="cells of 6 keys: the stride must divide"):
        sa.select(spec, *qk(13))


def test_bad_sizes_and_scores_are_refused():
    with pytest.raises(ValueError, match="stride"):
        attended(4, 0)
    with pytest.raises(ValueError, match="attended: keys"):
        attended(keys="no name")
    with pytest.raises(TypeError, match=r"must be a name, dot\(...\) or attended"):
        scored(3)


@pytest.mark.sample(1)
@pytest.mark.parametrize("by", ["mean", "min_max", "max", "attention", attended(4, 4)])
def test_a_traced_scale_of_float64(by):
    """Scores are of float32, whatever the scale is."""
    q, k = qk(13)
    spec = sa.causal() & sa.topk(2, block=4, score=by, eligible=sa.causal())
    (wanted,) = sa.select(spec, q, k, sm_scale=0.3).values()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):

        @jax.jit
        def call(scale):
            wide = (jnp.asarray(x, jnp.float64) for x in (q, k))
            return sa.select(spec, *wide, sm_scale=scale)

        (found,) = call(jnp.asarray(0.3, jnp.float64)).values()
    np.testing.assert_array_equal(found, wanted)
