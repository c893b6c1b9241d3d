"""Locality-sensitive hashing: buckets, chunks and their union; Reformer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from content_cases import drawn
from hashing_oracle import bucket, chunks_of, gray

import sadsl as sa
from sadsl import catalog
from sadsl.run.call import select
from sadsl.selections import lsh, sorted_chunks
from sadsl.selections.lsh import gray_rank, hashes

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

# --- the map against loops ---


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


@pytest.mark.sample(3)
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


@pytest.mark.slow
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
    ],
)  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
