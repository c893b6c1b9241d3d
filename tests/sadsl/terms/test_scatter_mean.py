"""Routing attention against its definition, written out in NumPy from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from sadsl.catalog import routing_transformer
from sadsl.selections import kmeans
from sadsl.selections.kmeans import assignments, nearest, normalized


@pytest.fixture
def quick(quick_compilation):
    """Compiled in a hurry, where a test is not about speed."""
    jax.config.update("jax_disable_most_optimizations", True)


# Two clusters of three of six tokens; token 5 is in none, token 2 in both.
AFFINITIES = np.array([[5, 1, 4, 0, 3, 2], [0, 6, 5, 4, 1, 2]], np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer_norm(x):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def top_of(scores, window):
    """The best by score, then by index, one after the other; ascending."""
    eligible = [i for i in range(len(scores)) if np.isfinite(scores[i])]
    ranked = sorted(eligible, key=lambda i: (-scores[i], i))
    return sorted(ranked[:window])


def members_of(x, centroids, window):
    """Positions ``[batch][head][cluster]``; x is ``[batch, n, heads, dim]``."""
    return [
        [
            [top_of(np.asarray(row[:, h], np.float64) @ mean, window) for mean in means]
            for h, means in enumerate(np.asarray(centroids, np.float64))
        ]
        for row in x
    ]


def scattered(q, k, v, pairs, count, *, scale, eps):
    """The averaged output, from the pairs of every cluster ``[b, h, c, q, k]``."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k)[:, :, None] * scale
    s = jnp.where(pairs, s, -1e30)
    p = jnp.where(pairs, jnp.exp(s - s.max(-1, keepdims=True)), 0.0)
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    total = jnp.einsum("bhcqk,bkhd->bqhd", p, v)
    return total / (count + eps)


def pairs_of(members, allowed, alone=False):
    """The pairs of every cluster, and in how many each query is, ``[b, q, h, 1]``.

    ``members`` are those of queries and of keys, ``allowed`` is ``[heads, q, k]``.
    """
    heads, n, kv = allowed.shape
    shape = len(members[0]), heads, len(members[0][0][0])
    pairs, held = np.zeros((*shape, n, kv), bool), np.zeros((*shape, n), bool)
    for b, h, c in np.ndindex(*shape):
        queries, keys = (m[b][h][c] for m in members)
        held[b, h, c, queries] = True
        pairs[b, h, c][np.ix_(queries, keys)] = allowed[h][np.ix_(queries, keys)]
        if alone:
            for i in queries:
                if pairs[b, h, c, i].sum() > 1:
                    pairs[b, h, c, i, i] = False
    return pairs, np.swapaxes(held.sum(axis=2), 1, 2)[..., None].astype(np.float64)


@jax.jit
def with_gradients(q, k, v, do, pairs, count, options):
    f = lambda *x: scattered(*x, pairs, count, **options)
    out, pull = jax.vjp(f, q, k, v)
    return out, *pull(do)


def expected(q, k, v, do, members, allowed, alone=False, **options):
    """Values and gradients of ``scattered`` for the cotangent ``do``, in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, do)]
        held = map(jnp.asarray, pairs_of(members, allowed, alone))
        return [np.asarray(x) for x in with_gradients(*wide, *held, options)]


def actual(spec, q, k, v, do, impl="xla", **options):
    options["interpret"] = impl in ("tpu", "triton")

    @jax.jit
    def run(q, k, v, do):
        f = lambda *x: sa.attention(*x, spec, impl=impl, **options)
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(do)

    return run(*map(jnp.asarray, (q, k, v, do)))


def check(spec, q, k, v, centroids, *args, impl="xla", **options):
    """Values and gradients; ``args`` and ``options`` are those of ``expected``."""
    do = normal(*q.shape[:3], v.shape[3], seed=9)
    wanted = expected(q, k, v, do, *args, **options)
    found = actual(spec, q, k, v, do, impl, operands={"centroids": centroids})
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
        oracle.assert_close(a, b, "float32", f"{spec} {impl} {name}")


def causal_pairs(heads, n):
    return np.broadcast_to(np.tril(np.ones((n, n), bool)), (heads, n, n))


# ---- The worked example


def example():
    q = AFFINITIES.T[None, :, None]
    return q, normal(1, 6, 1, 3), {"centroids": np.eye(2, dtype=np.float32)[None]}


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_the_worked_example(impl, quick):
    q, v, operands = example()
    spec = sa.scatter_mean(sa.causal() & kmeans(2, 3, norm="none"), sm_scale=0.1)
    (found, _) = sa.select(spec, q, q, operands=operands).values()
    np.testing.assert_array_equal(found[0, 0], [[0, 2, 4], [1, 2, 3]])
    out = sa.attention(*map(jnp.asarray, (q, q, v)), spec, operands=operands, impl=impl)
    out = np.asarray(out)[0, :, 0]
    np.testing.assert_array_equal(out[5], np.zeros(3))
    np.testing.assert_allclose(out[0], v[0, 0, 0] / 1.01, rtol=1e-6)

    def softmax(keys):
        p = np.exp([0.1 * q[0, 2, 0] @ q[0, j, 0] for j in keys])
        return p / p.sum() @ v[0, keys, 0]

    np.testing.assert_allclose(out[2], (softmax([0, 2]) + softmax([1, 2])) / 2.01, 1e-5)
    if impl == "xla":
        # One softmax over the union is another mechanism.
        union = sa.attention(
            *map(jnp.asarray, (q, q, v)), sa.causal() & kmeans(2, 3, norm="none"),
            sm_scale=0.1, operands=operands,
        )  # fmt: skip
        np.testing.assert_allclose(union[0, 2, 0], softmax([0, 1, 2]), 1e-5)


def test_the_lower_cluster_wins_a_tie():
    q, _, operands = example()
    spec = kmeans(2, members="argmax", norm="none")
    chosen = sa.select(spec, q, q, operands=operands)
    np.testing.assert_array_equal(chosen[spec.key("q_label")][0, 0], [0, 1, 1, 1, 0, 0])


# ---- Who is chosen


@pytest.mark.parametrize(("n", "window"), [(1, 1), (13, 5), (130, 130), (257, 20)])
def test_members_are_the_best_then_the_first(n, window):
    scores = np.round(normal(4, n, seed=n) * 2)  # many ties, zeros of both signs
    scores[0, n // 2] = np.nan
    scores[1, ::2] = np.inf
    scores[2] = -np.inf
    found = np.asarray(jax.jit(nearest, static_argnums=1)(scores, window))
    for row, at in zip(scores, found, strict=True):
        wanted = top_of(row, window)
        np.testing.assert_array_equal(at, wanted + [n] * (window - len(wanted)))


def test_labels_skip_what_is_not_finite():
    scores = np.array([[1, np.nan, -np.inf, 2], [1, 3, np.nan, np.inf]], np.float32)
    np.testing.assert_array_equal(assignments(jnp.asarray(scores)), [0, 1, -1, 0])


def test_norms_and_the_centroid_product(quick):
    q, centroids = normal(2, 40, 2, 8), normal(2, 3, 8, seed=1)
    for norm, by_hand in (("layer", layer_norm), ("unit", unit), ("none", np.asarray)):
        spec = kmeans(3, 9, norm=norm)
        np.testing.assert_allclose(normalized(q, norm), by_hand(q), atol=2e-6)
        term = sa.scatter_mean(spec)
        (found, same) = sa.select(
            term, q, q, operands={"centroids": centroids}
        ).values()
        np.testing.assert_array_equal(found, members_of(by_hand(q), centroids, 9))
        np.testing.assert_array_equal(found, same)


# ---- The averaged term


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton", "reference"])
def test_the_official_head(impl):
    n, heads = (130 if impl == "xla" else 37), 2
    batch = 2 if impl == "xla" else 1
    raw, v = normal(batch, n, heads, 8), normal(batch, n, heads, 5, seed=1)
    q = layer_norm(raw).astype(np.float32)
    centroids = layer_norm(normal(heads, 3, 8, seed=2)).astype(np.float32)
    members = members_of(layer_norm(q), centroids, n // 3)
    spec = sa.scatter_mean(sa.causal() & kmeans(3, n // 3), sm_scale=1.0)
    args = (members, members), causal_pairs(heads, n)
    check(spec, q, q, v, centroids, *args, impl=impl, scale=1.0, eps=0.01)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_lucidrains_sees_itself_only_where_it_is_alone(impl, quick):
    n, heads = 41, 2
    q, v = normal(1, n, heads, 8), normal(1, n, heads, 5, seed=1)
    k = unit(q).astype(np.float32)
    centroids = unit(normal(heads, 4, 8, seed=2)).astype(np.float32)
    members = members_of(unit(q), centroids, 12)
    (spec, count) = routing_transformer(4, 4, 12, variant="lucidrains").shares[1]
    assert count == 2
    options = {"scale": 8**-0.5, "eps": 1e-5, "alone": True, "impl": impl}
    members = members, members
    if impl == "xla":
        causal = causal_pairs(heads, n)
        check(spec, q, k, v, centroids, members, causal, **options)
    # With a window more of them are alone.
    near = sa.scatter_mean(spec.map & sa.window(2), eps_count=1e-5, own_key="alone")
    allowed = (sa.causal() & sa.window(2)).dense(n, num_heads=heads)
    check(near, q, k, v, centroids, members, allowed, **options)


@pytest.mark.slow
def test_keys_of_their_own_shared_by_groups_under_a_map_of_each_head(quick):
    n, heads = 53, 4
    q, k = normal(1, n, heads, 8), normal(1, n, 2, 8, seed=1)
    v = normal(1, n, 2, 5, seed=2)
    v[:, n - 4 :] = 0
    centroids = normal(heads, 3, 8, seed=3)
    by_head = sa.per_head(sa.causal() & sa.window(9), sa.causal() - sa.strided(3))
    spec = by_head & kmeans(3, 7, share_qk=False)
    of_k = members_of(np.repeat(layer_norm(k), 2, axis=2), centroids, 7)
    members = members_of(layer_norm(q), centroids, 7), of_k
    allowed = by_head.dense(n, num_heads=heads) & (np.arange(n) < n - 4)
    term = sa.scatter_mean(spec, skip_zeros=True, eps_count=0.5)
    options = {"scale": 8**-0.5, "eps": 0.5}
    check(term, q, k, v, centroids, members, allowed, **options)


@pytest.mark.slow
def test_one_cluster_of_all_is_dense_attention(quick):
    q, v = normal(1, 257, 2, 8), normal(1, 257, 2, 8, seed=1)
    q, v, centroids = map(jnp.asarray, (q, v, normal(2, 1, 8, seed=2)))
    spec = sa.scatter_mean(sa.causal() & kmeans(1))
    found = sa.attention(q, q, v, spec, operands={"centroids": centroids})
    dense = sa.attention(q, q, v, sa.causal())
    np.testing.assert_allclose(found, dense / 1.01, atol=2e-6)


@pytest.mark.slow
def test_segments_an_offset_and_what_select_chose(quick):
    n, skipped = 48, 9
    q, k, v = (jnp.asarray(normal(2, n, 2, 8, seed=i)) for i in range(3))
    q = q[:, skipped:]
    ids = np.array([np.arange(n) // 20, np.arange(n) // 9])
    operands = {"q_segment_ids": ids[:, skipped:], "kv_segment_ids": ids}
    operands["centroids"] = normal(2, 3, 8, seed=4)
    spec = sa.scatter_mean(sa.causal() & sa.segments() & kmeans(3, 16, share_qk=False))
    chosen = sa.select(spec, q, k, operands=operands, q_offset=skipped)
    assert {x.shape for x in chosen.values()} == {(2, 2, 3, 16)}
    del operands["centroids"]
    found = sa.attention(
        q, k, v, spec, operands=operands | chosen, q_offset=skipped
    )  # fmt: skip
    # By hand: causal at true positions, within the documents of each batch row.
    for b in range(2):
        same = ids[b, skipped:, None] == ids[b]
        pairs = same & (np.arange(n) <= np.arange(skipped, n)[:, None])
        members = [
            [[[*m] for m in h] for h in np.asarray(x)[[b]]] for x in chosen.values()
        ]
        held, count = pairs_of(members, np.broadcast_to(pairs, (2, *pairs.shape)))
        mine = (np.asarray(x[b : b + 1], np.float64) for x in (q, k, v))
        wanted = scattered(*mine, held, count, scale=8**-0.5, eps=0.01)
        np.testing.assert_allclose(found[b], wanted[0], atol=2e-5)


def test_content_neither_compiles_again_nor_passes_a_gradient_to_centroids(quick):
    q, v = (jnp.asarray(normal(1, 30, 1, 8, seed=i)) for i in range(2))
    spec = sa.scatter_mean(sa.causal() & kmeans(3))
    traces = []

    @jax.jit
    def gradient(centroids, q):
        traces.append(1)
        f = lambda c: jnp.sum(
            sa.attention(q, q, v, spec, operands={"centroids": c}) ** 2
        )
        return jax.grad(f)(centroids)

    for seed in range(3):
        found = gradient(jnp.asarray(normal(1, 3, 8, seed=seed)), q + seed)
        np.testing.assert_array_equal(found, np.zeros_like(found))
    assert len(traces) == 1


def test_vectors_that_are_not_finite_are_in_no_cluster(quick):
    q, v = normal(1, 20, 1, 8), normal(1, 20, 1, 4, seed=1)
    q[0, 3], q[0, 7, 0, 2] = np.nan, np.inf
    operands = {"centroids": normal(1, 2, 8, seed=2)}
    spec = sa.scatter_mean(sa.causal() & kmeans(2, 20, norm="none"))
    out = sa.attention(*map(jnp.asarray, (q, q, v)), spec, operands=operands)
    assert jnp.isfinite(out).all()
    np.testing.assert_array_equal(out[0, [3, 7]], 0)
    assert (jnp.abs(out[0]).max(axis=(1, 2)) > 0).sum() == 18


# ---- As a map


@pytest.mark.slow
@pytest.mark.parametrize("members", ["argmax", "topw"])
def test_the_map_is_one_softmax_over_the_union(members, quick):
    q, k, v = (normal(2, 40, 2, 8, seed=i) for i in range(3))
    operands = {"centroids": normal(2, 3, 8, seed=3)}
    share = members == "topw"
    spec = sa.causal() & kmeans(3, members=members, share_qk=share)
    chosen = sa.select(spec, q, k, operands=operands)
    pairs = np.zeros((2, 2, 40, 40), bool)
    means = operands["centroids"]
    if share:
        for b, of_batch in enumerate(members_of(layer_norm(q), means, 14)):
            for h, clusters in enumerate(of_batch):
                for at in clusters:
                    pairs[b, h][np.ix_(at, at)] = True
    else:
        labels = (
            np.einsum("bnhd,hcd->bhnc", layer_norm(x), means).argmax(-1) for x in (q, k)
        )
        a, b = labels
        pairs = a[..., :, None] == b[..., None, :]
    pairs &= np.tril(np.ones((40, 40), bool))
    for b in range(2):
        parts = {name: np.asarray(x)[b] for name, x in chosen.items()}
        np.testing.assert_array_equal(
            spec.dense(40, num_heads=2, operands=parts), pairs[b]
        )
    do = normal(*v.shape, seed=5)
    wanted = oracle.with_gradients(
        *(np.swapaxes(x, 1, 2) for x in (q, k, v)), pairs, 8**-0.5,
        do=np.swapaxes(do, 1, 2),
    )  # fmt: skip
    found = actual(spec, q, k, v, do, operands=operands)
    for a, b in zip(found, (wanted.o, *wanted[2:]), strict=True):
        oracle.assert_close(a, np.swapaxes(b, 1, 2), "float32")
