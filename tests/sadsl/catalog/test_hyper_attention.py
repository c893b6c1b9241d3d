"""HyperAttention against its definition, with the same directions and samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from content_cases import drawn
from hashing_oracle import bucket, chunks_of

import sadsl as sa
from sadsl import catalog
from sadsl.catalog.hyper_attention import Draws, Hyper, draw_hyper, pieces

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

HYPER = partial(catalog.hyper_attention, return_lse=True, impl="reference")


def by_head(x):
    return np.swapaxes(np.asarray(x), 1, 2)


def draws_of(how, q, k):
    """As ``draw_hyper``, by NumPy."""
    rng = np.random.default_rng(0)
    batch, n, heads, head_dim = q.shape
    samples = [
        rng.integers(p.shape[1], size=(batch, heads, how.samples)).astype(np.int32)
        for p in pieces(how, n, k.shape[1])
        if not p.exact
    ]
    return Draws(drawn(1, 1, head_dim, how.bits, seed=9), tuple(samples))


def weights_of(q, k, draws, how):
    """How often each pair counts, by definition: float64 ``[batch, heads, q, k]``."""
    batch, n, heads, _ = q.shape
    m = k.shape[1]
    counts = np.zeros((batch, heads, n, m))
    samples = iter(draws.samples)
    for piece in pieces(how, n, m):
        if piece.exact:
            for i in range(piece.q_start, piece.q_stop):
                last = i + 1 if how.causal else piece.k_stop
                counts[:, :, i, piece.k_start : last] += 1
            continue
        drawn_keys = np.asarray(next(samples))
        rows = range(piece.q_start, piece.q_stop)
        columns = range(piece.k_start, piece.k_stop)
        directions = np.asarray(draws.projections)
        size = -(-how.block * len(rows) // len(columns))
        for b, h in np.ndindex(batch, heads):
            p = directions[h % len(directions), 0]
            of_q = [bucket(q[b, i, h], p, "signs") for i in rows]
            of_k = [bucket(k[b, j, h], p, "signs") for j in columns]
            order = sorted(range(len(columns)), key=lambda j: (of_k[j], j))
            q_block, k_block = chunks_of(of_q, size), chunks_of(of_k, how.block)
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    counts[b, h, row, column] += q_block[i] == k_block[j]
                for place in drawn_keys[b, h]:
                    if q_block[i] != place // how.block:
                        weight = len(columns) / how.samples
                        counts[b, h, row, columns[order[place]]] += weight
    return counts


@jax.jit
def weighted(arrays, dlse, counts):
    """Attention whose exponentials are multiplied by ``counts``: o, dq, dk, dv, lse."""
    *inputs, do = arrays

    def attend(q, k, v):
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 4**-0.5
        p = counts * jnp.exp(s)
        total = p.sum(axis=-1, keepdims=True)
        return jnp.einsum("bhqk,bhkd->bhqd", p / total, v), jnp.log(total[..., 0])

    (o, lse), pull = jax.vjp(attend, *inputs)
    return o, *pull((do, dlse)), lse


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("how", "lengths", "impl"),
    [
        (Hyper(8, 0, 3, min_seq_len=1), (21, 33), "reference"),
        (Hyper(8, 6, 3, min_seq_len=22), (45, 21), "reference"),
        (Hyper(4, 3, 2, min_seq_len=6, causal=True), (24, 24), "reference"),
        (Hyper(8, 5, 3, min_seq_len=1), (45, 21), "xla"),
    ],
)
def test_hyper_attention(how, lengths, impl):
    """Values, lse and gradients, with the same directions and samples."""
    n, m = lengths
    q, do = drawn(2, n, 2, 4), drawn(2, n, 2, 4, seed=1)
    k, v = drawn(2, m, 1, 4, seed=2), drawn(2, m, 1, 4, seed=3)
    dlse = drawn(2, 2, n, seed=4)
    draws = draws_of(how, q, k)

    @jax.jit
    def call(q, k, v, draws, cotangents):
        attend = partial(
            catalog.hyper_attention, draws=draws, how=how, return_lse=True, impl=impl
        )
        out, pull = jax.vjp(attend, q, k, v)
        return *out, *pull(cotangents)

    out = call(q, k, v, draws, (do, dlse))
    spread = [np.repeat(x, 2, axis=2) for x in (k, v)]
    counts = weights_of(q, spread[0], draws, how)
    with jax.enable_x64(True):
        wide = [jnp.asarray(by_head(x), jnp.float64) for x in (q, *spread, do)]
        wanted = weighted(wide, jnp.asarray(dlse, jnp.float64), jnp.asarray(counts))
        wanted = [np.asarray(x) for x in wanted]
    wanted[2:4] = [x.sum(axis=1, keepdims=True) for x in wanted[2:4]]
    found = [by_head(out[i]) for i in (0, 2, 3, 4)] + [np.asarray(out[1])]
    for a, b in zip(found, wanted, strict=True):
        oracle.assert_close(a, b, "float32", repr(how))


def test_draws():
    how = Hyper(4, 30, 2, min_seq_len=5, causal=True)
    q = drawn(2, 24, 2, 4)
    made = jax.jit(partial(draw_hyper, how=how))(jax.random.key(0), q, q)
    shapes = jax.tree.map(jnp.shape, draws_of(how, q, q))
    assert jax.tree.map(jnp.shape, made) == shapes
    for x, piece in zip(made.samples, (6, 12, 6), strict=True):
        assert (int(x.min()), int(x.max())) == (0, piece - 1)
    assert np.any(made.samples[0] != made.samples[2])


def test_halves_cover_the_causal_triangle():
    for n in (1, 2, 13, 64, 67):
        cover = np.zeros((n, n), int)
        for piece in pieces(Hyper(min_seq_len=5, causal=True), n, n):
            rows = slice(piece.q_start, piece.q_stop)
            columns = slice(piece.k_start, piece.k_stop)
            part = np.ones(piece.shape[:2], int)
            cover[rows, columns] += np.tril(part) if piece.exact else part
        np.testing.assert_array_equal(cover, np.tril(np.ones((n, n), int)))
    # As published: 8,192 tokens are halved once, 8,191 are exact.
    count = lambda n: len(pieces(Hyper(causal=True), n, n))
    assert [count(n) for n in (8191, 8192, 16384)] == [1, 3, 7]


def test_recursion_with_exact_blocks_is_dense():
    how = Hyper(64, 4, 2, min_seq_len=6, causal=True)
    q, k, v = (drawn(1, 13, 2, 4, seed=s) for s in range(3))
    draws = draws_of(how, q, k)
    assert len(draws.samples) == 1
    attend = partial(HYPER, how=how)
    actual = jax.jit(attend)(q, k, v, draws)
    wanted = sa.attention(q, k, v, "causal()", return_lse=True, impl="reference")
    for a, b in zip(actual, wanted, strict=True):
        oracle.assert_close(a, np.asarray(b), "float32")


def test_samples_are_unbiased():
    """The mean of the normaliser over many draws: unmasked, it is a fifth more."""
    how = Hyper(8, 8, 3, min_seq_len=1)
    q, k, v = (drawn(1, 40, 1, 4, seed=s) for s in range(3))
    q, k, v = (np.repeat(x, 1500, axis=0) for x in (q, k, v))
    draws = draws_of(how, q, k)
    attend = partial(HYPER, how=how)
    _, lse = jax.jit(attend)(q, k, v, draws)
    mean = np.exp(np.asarray(lse, np.float64)).mean(axis=0)[0]
    s = q[0, :, 0] @ k[0, :, 0].T * 4**-0.5
    error = mean / np.exp(s).sum(axis=-1) - 1
    assert np.abs(error).mean() < 0.02
    assert np.abs(error.mean()) < 0.01


Q = drawn(1, 8, 2, 4)


def draw_and_call(how, q):
    return catalog.hyper_attention(q, Q, Q, draws_of(how, q, Q), how)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Hyper(block=0), "block=0 must be at least 1"),
        (lambda: draw_and_call(Hyper(causal=True), Q[:, :4]), "4 queries and 8 keys"),
        (lambda: catalog.hyper_attention(Q, Q, Q, draws_of(Hyper(), Q, Q),
                                 Hyper(samples=4, min_seq_len=1)),
         r"shapes \[\]: .* there must be 1 of \(1, 2, 4\)"),
    ],
)  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
