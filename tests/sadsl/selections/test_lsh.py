"""Locality-sensitive hashing: buckets, chunks, rounds; Reformer and HyperAttention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from content_cases import drawn

import sadsl as sa
from sadsl import catalog
from sadsl.catalog.hyper_attention import Draws, Hyper, draw_hyper, pieces
from sadsl.run.call import select
from sadsl.selections import lsh, sorted_chunks
from sadsl.selections.lsh import gray_rank, hashes


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    """Compiled as for the interpreter: here compilation takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)


# --- the map against loops ---


def gray(bits):
    """The reflected code: words in an order in which neighbours differ in one bit."""
    if bits == 1:
        return [0, 1]
    half = gray(bits - 1)
    return half + [w + 2 ** (bits - 1) for w in reversed(half)]


def bucket(x, directions, kind):
    """Of one vector, float64; None if it is not finite."""
    if not np.isfinite(x).all():
        return None
    products = x.astype(np.float64) @ directions.astype(np.float64)
    if kind == "angular":
        return int(np.argmax([*products, *-products]))
    return gray(len(products)).index(sum(2**b for b, y in enumerate(products) if y > 0))


def chunks_of(buckets, size):
    """The chunk of each token in the order by bucket and position; None for none."""
    order = sorted((b, i) for i, b in enumerate(buckets) if b is not None)
    place = {i: at // size for at, (_, i) in enumerate(order)}
    return [place.get(i) for i in range(len(buckets))]


def in_round(q, k, directions, spec):
    """The pairs of one head and round."""
    of_q = [bucket(x, directions, spec.kind) for x in q]
    of_k = of_q if spec.share else [bucket(x, directions, spec.kind) for x in k]
    found = np.zeros((len(q), len(k)), bool)
    chunks = spec.chunks
    if chunks is not None:
        q_chunk = chunks_of(of_q, -(-chunks.size * len(q) // len(k)))
        k_chunk = chunks_of(of_k, chunks.size)
    for i in range(len(q)):
        for j in range(len(k)):
            if of_q[i] is None or of_k[j] is None:
                continue
            same = of_q[i] == of_k[j]
            if chunks is not None:
                near = 0 <= q_chunk[i] - k_chunk[j] <= chunks.before
                same = near and (same or chunks.across)
            found[i, j] = same
    return found


def expected(q, k, directions, spec):
    """Bool ``[batch, heads, q, k]``."""
    heads = []
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        rows = q[b, :, h], k[b, :, h]
        each = [in_round(*rows, p, spec) for p in directions[h % len(directions)]]
        pairs = np.any(each, axis=0)
        if spec.alone:
            others = pairs & ~np.eye(len(pairs), dtype=bool)
            if spec.alone == "causal":
                others = np.tril(others)
            for i in range(len(pairs)):
                pairs[i, i] = pairs[i, i] and not others[i].any()
        heads.append(pairs)
    return np.reshape(heads, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))


@partial(jax.jit, static_argnums=(0,))
def parts_of(spec, q, k, directions):
    return select(spec, q, k, operands={"projections": directions})


def found(spec, q, k, directions):
    parts = parts_of(spec, q, k, directions)
    rows = [
        spec.dense(
            q.shape[1], k.shape[1], q.shape[2],
            operands={name: np.asarray(x)[b] for name, x in parts.items()},
        )
        for b in range(len(q))
    ]  # fmt: skip
    return np.stack(rows)


SPECS = [
    lsh(8, 2),
    lsh(8, kind="signs"),
    lsh(6, 2, share=True, alone="full"),
    lsh(8, 2, chunks=sorted_chunks(4)),
    lsh(4, kind="signs", chunks=sorted_chunks(5, 0, True)),
    lsh(4, 2, share=True, alone="causal", chunks=sorted_chunks(3)),
    lsh(4, 2, share=True, alone="full", chunks=sorted_chunks(3, 2)),
    lsh(4, share=True, alone="causal", chunks=sorted_chunks(4, 0)),
    lsh(4, 2, share=True, alone="causal", chunks=sorted_chunks(2, 1, True)),
    lsh(4, share=True, alone="full", chunks=sorted_chunks(2, 0, True)),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_is_what_loops_find(spec):
    small = [(1, 1), (13, 13)] if spec == SPECS[0] else []
    for n, kv in (*small, (33, 33) if spec.share else (21, 33)):
        q, k = drawn(1, n, 2, 4, seed=n), drawn(1, kv, 2, 4, seed=n + 50)
        q[0, n // 2, 1], k[0, kv // 3, 0, 2] = np.nan, np.inf
        directions = drawn(2, spec.rounds, 4, spec.columns, seed=n)
        pairs = found(spec, q, k, directions)
        np.testing.assert_array_equal(pairs, expected(q, k, directions, spec))
        # What is not a number sees nothing, and is not seen.
        assert n == 1 or not pairs[0, 1, n // 2].any()
        if not spec.share:
            assert not pairs[0, 0, :, kv // 3].any()
    assert sa.parse(repr(spec)) == spec


def test_gray_code():
    for bits in (1, 2, 3, 7):
        rank = np.asarray(gray_rank(jnp.arange(2**bits), bits))
        assert rank[gray(bits)].tolist() == list(range(2**bits))


def test_opposite_vectors_fall_into_opposite_buckets():
    """Ties go to the lower bucket."""
    x = drawn(1, 1, 257, 6)
    directions = drawn(1, 1, 1, 6, 5, seed=1)
    # More than are projected at a time.
    wanted = [bucket(row, directions[0, 0, 0], "angular") for row in x[0, 0]]
    assert np.asarray(hashes(x, directions, "angular"))[0, 0, 0].tolist() == wanted
    both = [np.asarray(hashes(y, directions, "angular"))[0, 0, 0] for y in (x, -x)]
    np.testing.assert_array_equal((both[0] + 5) % 10, both[1])
    assert set(both[0].tolist()) == set(range(10))
    assert not np.asarray(hashes(x, 0 * directions, "angular")).any()


def test_one_bucket_is_everything():
    spec, q = lsh(2), drawn(1, 13, 2, 4)
    assert found(spec, q, q, np.zeros((1, 1, 4, 1), np.float32)).all()


def test_reformer_attends_to_itself_only_if_alone():
    spec = catalog.reformer(16, 2, 4)
    q = drawn(1, 67, 2, 4)
    directions = drawn(2, 2, 4, 8, seed=1)
    pairs = found(spec, q, q, directions)[0]
    alone = np.diagonal(pairs, axis1=1, axis2=2)
    np.testing.assert_array_equal(alone, pairs.sum(axis=2) == alone)
    assert pairs.any(axis=2).all()
    assert alone[:, 0].all()
    assert 2 < alone.sum() < 100


# --- attention over what was chosen ---


def by_head(x):
    return np.swapaxes(np.asarray(x), 1, 2)


def test_attention_and_gradients():
    spec = catalog.reformer(8, 2, 16)
    q, v, do = (jnp.asarray(drawn(2, 67, 2, 8, seed=s)) for s in (0, 1, 2))
    k = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    directions = jnp.asarray(drawn(2, 2, 8, 4, seed=3))
    pairs = found(spec, q, k, directions)
    config = sa.KernelConfig(block_q=32, block_kv=32)

    @jax.jit
    def call(q, k, v, directions):
        def attend(q, k, v, directions):
            operands = {"projections": directions}
            return sa.attention(
                q, k, v, spec, operands=operands, impl="xla", config=config
            )

        o, pull = jax.vjp(attend, q, k, v, directions)
        return o, *pull(do)

    *actual, of_directions = call(q, k, v, directions)
    assert not np.any(of_directions)
    wanted = oracle.with_gradients(
        *map(by_head, (q, k, v)), pairs, 8**-0.5, do=by_head(do)
    )
    for a, b in zip(actual, (wanted.o, *wanted[2:]), strict=True):
        oracle.assert_close(by_head(a), b, "float32")


# --- HyperAttention ---

HYPER = partial(catalog.hyper_attention, return_lse=True, impl="reference")


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


# --- bad input ---

Q = drawn(1, 8, 2, 4)
PROJECTIONS = {"projections": drawn(2, 1, 4, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lsh(7), "buckets=7 must be even"),
        (lambda: lsh(6, kind="signs"), "buckets=6 must be a power of two"),
        (lambda: lsh(0), "buckets=0 must be at least 2"),
        (lambda: lsh(8, 0), "rounds=0 must be at least 1"),
        (lambda: lsh(8, kind="cosine"), "kind='cosine' must be one of"),
        (lambda: lsh(8, share=True, alone="yes"), "alone='yes' must be one of"),
        (lambda: lsh(8, alone="full"), "pass share=True as well"),
        (lambda: sorted_chunks(0), "size=0 must be at least 1"),
        (lambda: select(lsh(8), Q, Q), "reads 'projections', the directions of lsh.8."),
        (lambda: select(lsh(8), Q, Q, operands=PROJECTIONS),
         r"shape \(2, 1, 4, 3\) .* needs .* \(2, 1, 4, 4\)"),
        (lambda: select(lsh(6, share=True), Q[:, :5], Q, operands=PROJECTIONS),
         "share=True needs a key for every query, not 5 queries .* and 8 keys"),
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


def draw_and_call(how, q):
    return catalog.hyper_attention(q, Q, Q, draws_of(how, q, Q), how)
