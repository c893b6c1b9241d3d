"""``key_mass`` and ``indexer_loss`` against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.layers.indexer import causal_lists, divergence, indexer_loss


def arrays(n=19, heads=4, kv_heads=2):
    rng = np.random.default_rng(0)
    shapes = (2, n, heads, 5), (2, n, kv_heads, 5)
    q, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    listed = np.sort(rng.integers(0, n, (2, kv_heads, n, 4)), axis=-1)
    listed[..., -1] = n
    return q, k, listed


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mass_of_listed_keys(groups):
    q, k, listed = arrays()
    listed = listed[:, [0, 1, 0, 1][:groups]]
    _, lse = sa.attention(q, k, k, sa.causal(), return_lse=True)
    found = sa.key_mass(q, k, lse, jnp.asarray(listed))
    qn, kn = np.asarray(q, np.float64), np.asarray(k, np.float64)
    s = np.einsum("bqhd,bkhd->bhqk", qn, np.repeat(kn, 2, axis=2)) * 5**-0.5
    p = np.exp(s - np.asarray(lse, np.float64)[..., None])
    p = np.concatenate([p, np.zeros_like(p[..., :1])], axis=-1)
    p = p.reshape(2, groups, -1, *p.shape[2:]).sum(2)
    wanted = np.take_along_axis(p, listed, axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    q, k, listed = arrays()
    _, lse = sa.attention(q, k, k, sa.causal(), return_lse=True)
    with pytest.raises(ValueError, match="lse has shape"):
        sa.key_mass(q, k, lse[:, :1], listed)
    with pytest.raises(ValueError, match="listed has shape"):
        sa.key_mass(q, k, lse, listed[:, :, :3])
    with pytest.raises(ValueError, match="3 groups of lists"):
        sa.key_mass(q, k, lse, np.repeat(listed[:, :1], 3, axis=1))


def test_divergence_ignores_what_has_no_weight():
    target = jnp.array([[[[0.0, 0.0], [3.0, 1.0]]]])
    scores = jnp.array([[[[1.0, 2.0], [0.5, 0.5]]]])
    share = np.array([0.75, 0.25])
    wanted = np.sum(share * (np.log(share) - np.log(0.5))) / 2
    found = divergence(target, scores, jnp.ones((1, 1, 2, 2), bool))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


RATIO, NEAR, N = 4, 6, 37
WHOLE = sa.where(lambda q, k: k < (q + 1) // RATIO)
SCORE = sa.dot("iq", "ik", "iw", "relu")
CHOICE = sa.topk(3, block=1, block_q=1, score=SCORE, scope="shared", eligible=WHOLE)


def compressed_sparse():
    """A call as DeepSeek-V4 makes it: a window, a sink, and entries by an indexer."""
    rng = np.random.default_rng(2)

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, x, entries = some(2, N, 4, 8), some(2, N, 1, 8), some(2, 9, 1, 8)
    index = {"iq": some(2, N, 2, 5), "ik": some(2, 9, 1, 5), "iw": some(2, N, 2)}
    return q, x, {"entries": entries, "sink": some(4)}, index


def weights_of_entries(q, x, own, seen):
    """float64 ``[batch, heads, q, entries]``: one softmax over all, by definition."""
    q, x, entries, sink = (
        np.asarray(a, np.float64) for a in (q, x, own["entries"], own["sink"])
    )
    keys = np.concatenate([x, entries], axis=1)[:, :, 0]
    s = np.einsum("bqhd,bkd->bhqk", q, keys) * 8**-0.5
    distance = np.arange(N)[:, None] - np.arange(N)
    near = (distance >= 0) & (distance <= NEAR)
    near = np.broadcast_to(near, (*seen.shape[:-1], N))
    pairs = np.concatenate([near, seen], axis=-1)
    e = np.where(pairs[:, None], np.exp(s), 0)
    total = e.sum(axis=-1) + np.exp(sink)[None, :, None]
    return (e / total[..., None])[..., N:]


def loss_by_definition(index, target, seen):
    """The mean of the KL divergences; ``target`` is that of all heads together."""
    s = jnp.einsum("bqhd,bkd->bqkh", index["iq"], index["ik"][:, :, 0])
    s = jnp.einsum("bqkh,bqh->bqk", jax.nn.relu(s), index["iw"])
    some = seen.any(axis=-1)
    s = jnp.where(seen, s, -jnp.inf)
    log_p = s - jax.nn.logsumexp(jnp.where(some[..., None], s, 0.0), -1, keepdims=True)
    total = target.sum(axis=-1, keepdims=True)
    share = target / np.where(total == 0, 1, total)
    log_share = np.log(np.where(share > 0, share, 1))
    terms = share * (log_share - jnp.where(seen, log_p, 0.0))
    return jnp.mean(jnp.sum(jnp.where(seen, terms, 0.0), axis=-1))


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_loss_of_an_indexer_of_entries(sparse):
    """Dense warm-up and sparse training of compressed sparse attention."""
    q, x, own, index = compressed_sparse()
    near = sa.softmax(sa.causal() & sa.window(NEAR), sink=True)
    spec = sa.joint(near, sa.over("entries", WHOLE & CHOICE if sparse else WHOLE))
    given, listed = own, causal_lists(N, RATIO)
    if sparse:
        given = {**own, **index}
        (listed,) = sa.select(spec, q, x, operands=given, lists=True).values()
    _, lse = sa.attention(q, x, x, spec, operands=given, return_lse=True)
    at = np.asarray(listed)
    seen = (at[..., None] == np.arange(9)).any(axis=-2)[:, 0]
    seen = np.broadcast_to(seen, (2, N, 9))
    wanted = weights_of_entries(q, x, own, seen).sum(axis=1)
    mass = sa.key_mass(q, own["entries"], lse, listed)
    of_lists = np.broadcast_to(at[:, 0], (2, *at.shape[2:]))
    padded = np.concatenate([wanted, np.zeros((2, N, 1))], axis=-1)
    of_lists = np.take_along_axis(padded, of_lists, axis=-1)
    np.testing.assert_allclose(mass[:, 0], of_lists, atol=2e-6)

    def loss(index):
        return indexer_loss(SCORE, index, q, own["entries"], lse, listed)

    found = jax.jit(jax.value_and_grad(loss))(index)
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(x, jnp.float64) for n, x in index.items()}
        of_definition = jax.value_and_grad(loss_by_definition)
        exact = of_definition(wide, jnp.asarray(wanted), jnp.asarray(seen))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1, np.abs(b).max()))


def test_entries_without_a_batch_axis_are_those_of_all():
    q, _, own, _ = compressed_sparse()
    lse, listed = jnp.zeros((2, 4, N)), causal_lists(N, RATIO)
    one = own["entries"][0]
    wanted = sa.key_mass(q, jnp.stack([one, one]), lse, listed)
    for entries in (one, one[None]):
        np.testing.assert_array_equal(sa.key_mass(q, entries, lse, listed), wanted)


def test_no_entries_have_no_mass():
    q, _, own, index = compressed_sparse()
    lse, listed = jnp.zeros((2, 4, N)), causal_lists(N, 40)
    none = own["entries"][:, :0]
    assert sa.key_mass(q, none, lse, listed).shape == (2, 1, N, 0)
    assert indexer_loss(SCORE, index, q, none, lse, listed) == 0
