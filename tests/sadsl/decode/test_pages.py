"""Paged caches: equal to the others, pages taken and given back, none shared."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa

N = 37
PREFILL = jax.jit(sa.prefill, static_argnames=("impl", "interpret"))
RELEASE = jax.jit(sa.release)
NEAR = sa.causal() & (sa.window(5) | sa.sinks(2))
SPECS = {
    "causal": sa.causal(),
    "segments": sa.causal() & sa.segments(),
    "shares": sa.heads((NEAR, 2), (sa.causal(), 2)),
    "strided": sa.causal() & (sa.strided(3) | sa.window(2)),
    "grid": sa.causal() & sa.Grid(h=1, w=N).neighborhood((1, 7)) | sa.sinks(N)
    & sa.causal(),
    "options": sa.softmax(
        sa.causal(), logits_soft_cap=20.0, sink=True, bias=sa.key_bias("c")
    ),
    "latent": sa.latent(sa.causal()),
    "local linear": sa.local_linear(sa.causal(), 1.0),
    "indexer": sa.causal()
    & sa.topk(
        6, block=1, block_q=1, score=sa.dot(weights="iw", act="relu"), scope="shared",
        eligible=sa.causal(),
    ),
    "joint": sa.joint(sa.causal(), sa.compressed(6, 4)),
}  # fmt: skip


def drawn(*shape, seed=3, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def made(name, batch=2, dtype="float32"):
    """q, k, v, and the arrays that a spec reads."""
    q, k, v = (
        drawn(batch, N, heads, dim, seed=i, dtype=dtype)
        for i, (heads, dim) in enumerate([(4, 8), (2, 8), (2, 5)])
    )
    if name == "latent":
        q, k = drawn(batch, N, 4, 5), drawn(batch, N, 1, 8, seed=1)
        v = k
    ids = np.sort(np.random.default_rng(5).integers(0, 4, (batch, N)), axis=1)
    arrays = {
        "segments": dict.fromkeys(("q_segment_ids", "kv_segment_ids"), ids),
        "options": {"c": drawn(batch, 4, N), "sink": drawn(4)},
        "latent": {"kv_b": drawn(4, 9, 6)},
        "indexer": {
            "iq": drawn(batch, N, 3, 4), "ik": drawn(batch, N, 1, 4),
            "iw": drawn(batch, N, 3),
        },
    }  # fmt: skip
    return (q, k, v), arrays.get(name, {})


def new_cache(name, inputs, arrays, **options):
    q, k, v = inputs
    return sa.init_cache(
        SPECS[name], len(q), N, k.shape[2], k.shape[3], k.dtype, num_heads=q.shape[2],
        head_dim_v=v.shape[3], operands=arrays, **options,
    )  # fmt: skip


def both(name, pieces, dtype="float32", page_size=5, **options):
    """The outputs with pages, and those of the whole call."""
    inputs, arrays = made(name, dtype=dtype)
    cache, found, at = new_cache(name, inputs, arrays, page_size=page_size), [], 0
    assert cache.keys.pages is not None
    for size in (*pieces, *[1] * (N - sum(pieces))):
        new = (x[:, at : at + size] for x in inputs)
        own = {n: of_tokens(n, x, slice(at, at + size)) for n, x in arrays.items()}
        prefill = PREFILL if at else sa.prefill
        cache, out = prefill(cache, *new, **as_options(own), **options)
        found.append(out)
        at += size
    assert int(cache.keys.pages.left) == 0
    whole = sa.attention(*inputs, SPECS[name], **as_options(arrays), impl="xla")
    return jnp.concatenate(found, axis=1), whole


def of_tokens(name, x, some):
    """The entries of some tokens."""
    if name in ("sink", "kv_b"):
        return x
    return x[:, :, some] if name == "c" else x[:, some]


def as_options(arrays):
    """Segment ids as options of their own, the rest as operands."""
    ids = {n: x for n, x in arrays.items() if n.endswith("segment_ids")}
    return ids | {"operands": {n: x for n, x in arrays.items() if n not in ids}}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_pieces_and_tokens_equal_the_whole(name):
    """A first piece, one of over 16 tokens, and then a token at a time."""
    found, expected = both(name, (9, 18))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_half_precision():
    found, expected = both("causal", (9, 18), "bfloat16")
    assert found.dtype == jnp.bfloat16
    wide = [x.astype("float32") for x in (found, expected)]
    np.testing.assert_allclose(*wide, atol=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "page"), [("tpu", 128), ("triton", 16)])
@pytest.mark.parametrize("name", ["causal", "segments"])
def test_kernels(impl, page, name):
    options = {"impl": impl, "interpret": True}
    found, expected = both(name, (31, 4), page_size=page, **options)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "page"), [("tpu", 64), ("triton", 8)])
def test_pages_that_are_too_small_for_a_kernel(impl, page):
    with pytest.raises(ValueError, match=f"page_size={page}: impl='{impl}' needs"):
        both("causal", (31, 4), page_size=page, impl=impl, interpret=True)


@pytest.mark.slow
def test_the_reference_reads_a_copy():
    found, expected = both("causal", (34, 2), impl="reference")
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


# --- sequences of their own lengths ---

BATCH, CHUNK, PAGE = 3, 4, 2


def attended(q, k, v):
    """Causal attention of the last queries of one sequence, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat(group, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[2])
    at = np.arange(len(q))[:, None] + len(k) - len(q)
    scores = np.where(np.arange(len(k)) <= at, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v)


class Server:
    """Three sequences of up to 13 tokens on one pool, and what each was given.

    Only ``left`` of the 21 pages are there, so that one program serves all tests.
    """

    def __init__(self, left=21):
        cache = sa.init_cache(
            "causal()", BATCH, 13, 2, 8, num_heads=4, ragged=True, page_size=PAGE
        )
        pages = replace(cache.keys.pages, left=np.int32(left))
        self.cache = replace(cache, keys=replace(cache.keys, pages=pages))
        self.given = [[np.zeros((0, 2, 8))] * 2 for _ in range(BATCH)]
        self.rng = np.random.default_rng(0)

    def tokens(self):
        shapes = (BATCH, CHUNK, 4, 8), (BATCH, CHUNK, 2, 8), (BATCH, CHUNK, 2, 8)
        return [self.rng.normal(size=x).astype(np.float32) for x in shapes]

    def take(self, *lengths, prefill=PREFILL, fill=None):
        """Adds tokens; returns which sequences have the right outputs."""
        q, k, v = self.tokens()
        if fill is not None:
            k, v = np.full_like(k, fill), np.full_like(v, fill)
        self.cache, out = prefill(self.cache, q, k, v, lengths=np.array(lengths))
        right = []
        for b, n in enumerate(lengths):
            for i, x in enumerate((k, v)):
                self.given[b][i] = np.concatenate([self.given[b][i], x[b, :n]])
            if n and np.isnan(out[b, :n]).all():
                right.append(False)
            elif n:
                expected = attended(q[b, :n], *self.given[b])
                np.testing.assert_allclose(out[b, :n], expected, rtol=1e-5, atol=1e-5)
                right.append(True)
            else:
                right.append(None)
        return right

    def end(self, b):
        self.cache = RELEASE(self.cache, jnp.int32(b))
        self.given[b] = [np.zeros((0, 2, 8))] * 2

    @property
    def left(self):
        return int(self.cache.keys.pages.left)


def test_prompts_of_several_lengths_and_sequences_that_end():
    server = Server(13)
    kinds = jax.tree.map(jax.typeof, server.cache)
    assert server.take(4, 1, 3) == [True] * 3
    assert server.left == 13 - (2 + 1 + 2)
    for _ in range(3):
        assert server.take(1, 1, 0) == [True, True, None]
    assert server.take(4, 0, 2) == [True, None, True]
    assert server.left == 13 - (6 + 2 + 3)
    server.end(0)
    assert server.left == 8
    # The pages of the first sequence come back in another order.
    assert server.take(0, 4, 3) == [None, True, True]
    assert server.take(3, 4, 1) == [True] * 3
    assert server.cache.length.tolist() == [3, 12, 9]
    for b in (2, 1, 0):
        server.end(b)
    assert server.left == 13
    assert server.take(4, 4, 4) == [True] * 3
    # A loop may carry it: no type has changed.
    assert jax.tree.map(jax.typeof, server.cache) == kinds
    assert not np.array_equal(server.cache.keys.pages.table[:, :2].ravel(), range(6))


def test_no_page_is_left():
    server = Server(4)
    assert server.take(4, 3, 0) == [True, True, None]
    before = server.cache
    with pytest.raises(ValueError, match=r"begin 1 pages of 2, and 0 of the 21 are"):
        server.take(1, 1, 0, prefill=sa.prefill)
    assert server.cache is before
    # Under jit the sequence that needs a page has NaN outputs; the other goes on.
    assert server.take(1, 1, 0) == [False, True, None]
    assert server.take(0, 0, 1) == [None, None, False]
    server.end(1)
    assert server.left == 2
    # What was lost stays lost, until the sequence ends, and takes no pages.
    assert server.take(2, 4, 0) == [False, True, None]
    assert server.left == 0
    server.end(0)
    assert server.take(3, 0, 0) == [True, None, None]


def test_sequences_are_served_in_the_order_of_the_batch():
    server = Server(3)
    assert server.take(1, 4, 1) == [True, True, False]
    server = Server(3)
    # The second would need two of one; the third comes after it.
    assert server.take(3, 4, 1) == [True, False, False]
    assert server.left == 1


def test_nan_of_a_sequence_that_ended_reaches_no_other():
    server = Server(3)
    server.take(4, 0, 0, fill=np.nan)
    server.end(0)
    assert server.take(0, 3, 1) == [None, True, True]
    assert all(np.isfinite(x).all() for x in server.cache.keys.rows.values())


def test_tokens_beyond_the_cache_take_no_page():
    server = Server()
    for _ in range(3):
        server.take(4, 4, 4)
    assert server.left == 3
    lengths = np.array([1, 0, 4])
    server.cache, out = PREFILL(server.cache, *server.tokens(), lengths=lengths)
    assert server.left == 1
    assert np.isfinite(out[2, 0]).all()
    assert np.isnan(out[2, 1:]).all()


def test_init_cache_inside_of_jit():
    def program(x, num_pages):
        cache = sa.init_cache("causal()", 2, 8, 1, 4, page_size=2, num_pages=num_pages)
        return sa.prefill(cache, x, x, x)

    x = drawn(2, 3, 1, 4)
    cache, out = jax.jit(program, static_argnums=1)(x, 4)
    expected = sa.attention(x, x, x, "causal()")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert int(cache.keys.pages.left) == 0
    with pytest.raises(ValueError, match="begin 4 pages of 2, and 3 of the 3"):
        jax.jit(program, static_argnums=1)(x, 3)


def test_a_sequence_without_pages_ends_too():
    """All that a ring, states and arrays by key hold of it is zero, as at first."""
    spec = sa.joint(NEAR & sa.segments(), sa.compressed(6, 4))
    empty = sa.init_cache(spec, 2, 20, 1, 4, ragged=True)
    used = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), empty)
    after = sa.release(used, np.array([1]))
    assert after.length.tolist() == [7, 0]
    assert len(jax.tree.leaves(after)) == 8
    for old, new, first in zip(
        *map(jax.tree.leaves, (used, after, empty)), strict=True
    ):
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_array_equal(new[1], first[1])
        assert new.dtype == first.dtype


# --- sizes and errors ---


def test_its_size_follows_from_the_pages():
    cache = sa.init_cache("causal()", 64, 1000, 2, 8, page_size=16, num_pages=80)
    assert cache.keys.k.shape == (80, 2, 16, 8)
    pool, table, free = 80 * 2 * 16 * 8 * 4 * 2, 64 * 63 * 4, 80 * 4
    assert cache.nbytes == pool + table + free + 4 + 4
    assert "all keys, 80 pages of 16" in str(cache)
    enough = sa.init_cache("causal()", 3, 1000, 2, 8, page_size=16)
    assert enough.keys.k.shape == (3 * 63, 2, 16, 8)


def test_rings_and_states_are_not_paged():
    for spec in (NEAR, sa.linear()):
        found = sa.init_cache(spec, 2, 1000, 2, 8, page_size=16, num_pages=3)
        assert found.nbytes == sa.init_cache(spec, 2, 1000, 2, 8).nbytes
        assert found.keys is None or found.keys.pages is None
    # Eight slots are over half of 15, so all of those are paged.
    assert sa.init_cache(NEAR, 2, 20, 2, 8, page_size=4).keys.k.shape == (2, 2, 8, 8)
    short = sa.init_cache(NEAR, 2, 15, 2, 8, page_size=4)
    assert short.keys.k.shape == (8, 2, 4, 8)


def test_what_is_refused():
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            sa.init_cache("causal()", 1, 8, 1, 4, **options)

    refused("num_pages=3 without page_size", num_pages=3)
    refused("page_size=0", page_size=0)
    refused("num_pages=0", page_size=4, num_pages=0)
    cache = sa.init_cache("causal()", 2, 8, 1, 4, page_size=4)
    with pytest.raises(ValueError, match="ragged=True"):
        sa.release(cache, 0)
    wide = sa.init_cache("causal()", 2, 8, 1, 5, page_size=4)
    with pytest.raises(ValueError, match=r"k has shape .* takes \(2, 3, 1, 5\)"):
        sa.prefill(wide, *[jnp.ones((2, 3, 1, 4))] * 3)
    ragged = sa.init_cache("causal()", 2, 8, 1, 4, page_size=4, ragged=True)
    for entry in (-1, 2):
        with pytest.raises(ValueError, match=f"entry {entry} is none of the 2"):
            sa.release(ragged, entry)
        # A traced one ends nothing.
        assert int(RELEASE(ragged, entry).keys.pages.left) == 4
    with pytest.raises(TypeError, match="float32: pass integers"):
        sa.release(ragged, jnp.ones(1))
    recurrent = sa.init_cache(sa.gated(NEAR, sa.linear()), 2, 8, 1, 4, ragged=True)
    with pytest.raises(NotImplementedError, match="a recurrence takes no lengths"):
        sa.release(recurrent, 0)
