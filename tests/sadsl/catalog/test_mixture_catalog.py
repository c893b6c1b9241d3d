"""Published mixtures against their definitions, in float64, given what was selected."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from sadsl import catalog

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

# Hardly optimised: what is at stake is what is computed.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SMALL = sa.KernelConfig(block_q=16, block_kv=16)
BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 45, 4, 2, 6
NSA = {"block": 8, "length": 6, "stride": 4, "window": 5}


def arrays():
    rng = np.random.default_rng(3)
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    shapes = [(BATCH, SEQ, h, DIM) for h in heads] + [(BATCH, SEQ, HEADS, 3)]
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def pooling(seq, length, stride):
    """``[blocks, seq]``: the mean of each whole block."""
    starts = range(0, seq - length + 1, stride)
    rows = [
        [1 / length if s <= i < s + length else 0 for i in range(seq)] for s in starts
    ]
    return np.array(rows)


def nsa_by_definition(q, k, v, gates, chosen):
    """Three softmaxes and a gated sum, all ``[batch, seq, heads, dim]``."""
    pool = pooling(SEQ, NSA["length"], NSA["stride"])
    own = {
        name: jnp.einsum("ji,bihd->bjhd", pool, x)
        for name, x in {"short_k": k, "short_v": v}.items()
    }
    own |= {"near_k": k, "near_v": v}
    return own_keys_by_definition(q, k, v, own, gates, chosen)


def own_keys_by_definition(q, k, v, own, gates, chosen):
    """As above, with keys and values of each branch."""
    last = np.arange(own["short_k"].shape[1]) * NSA["stride"] + NSA["length"] - 1
    at = np.arange(SEQ)
    past = (last[None, :] <= at[:, None])[None, None]
    distance = at[:, None] - at[None, :]
    near = ((distance >= 0) & (distance <= NSA["window"]))[None, None]
    outs = []
    for keys, values, pairs in (
        (own["short_k"], own["short_v"], past),
        (k, v, chosen),
        (own["near_k"], own["near_v"], near),
    ):
        by_head = (jnp.swapaxes(x, 1, 2) for x in (q, keys, values))
        out, _ = oracle.attention(*by_head, jnp.asarray(pairs), DIM**-0.5)
        outs.append(jnp.swapaxes(out, 1, 2))
    return sum(gates[..., m, None] * out for m, out in enumerate(outs))


@pytest.mark.slow
def test_native_sparse_attention():
    spec = catalog.native_sparse_attention(3, **NSA)
    selected = spec.terms[1]
    assert sa.parse(repr(spec)) == spec
    q, k, v, do, gates = arrays()

    @partial(jax.jit, compiler_options=QUICK)
    def call(q, k, v, gates, do):
        def attend(q, k, v, gates):
            given = {"gates": gates}
            return sa.attention(q, k, v, spec, operands=given, impl="xla", config=SMALL)

        out, pull = jax.vjp(attend, q, k, v, gates)
        return sa.select(spec, q, k), (out, *pull(do))

    chosen, found = call(q, k, v, gates, do)
    pairs = np.stack(
        [
            selected.dense(
                SEQ, num_heads=HEADS,
                operands={name: np.asarray(x)[b] for name, x in chosen.items()},
            )
            for b in range(BATCH)
        ]
    )  # fmt: skip
    # Of the blocks but for the short last one: the first, and the one before the own.
    by_block = pairs[:, :, -1, :40].reshape(BATCH, HEADS, 5, 8).any(axis=-1)
    assert by_block[:, :, [0, 4]].all()
    assert by_block.sum() == BATCH * HEADS * 2

    @partial(jax.jit, compiler_options=QUICK)
    def by_definition(do, *args):
        out, pull = jax.vjp(partial(nsa_by_definition, chosen=pairs), *args)
        return out, *pull(do)

    with jax.enable_x64(True):
        args = (np.asarray(x, np.float64) for x in (do, q, k, v, gates))
        wanted = by_definition(*map(jnp.asarray, args))
    for name, a, b in zip(["o", "q", "k", "v", "gates"], found, wanted, strict=True):
        oracle.assert_close(a, np.asarray(b), "float32", name)


def importance_by_loops(q, short):
    """By loops: each compressed block gives to where it lies, stride by stride."""
    q, short = (np.asarray(x, np.float64) for x in (q, short))
    found = np.zeros((BATCH, KV_HEADS, SEQ, 6))
    for b, h, i in np.ndindex(BATCH, HEADS, SEQ):
        seen = [j for j in range(short.shape[1]) if 4 * j + 5 <= i]
        e = np.exp([q[b, i, h] @ short[b, j, h // 2] * DIM**-0.5 for j in seen])
        for j, p in zip(seen, e / e.sum(), strict=True):
            for position in range(4 * j, 4 * j + 6):
                found[b, h // 2, i, position // 8] += p / 4
    return found


def test_blocks_are_selected_by_what_the_compressed_branch_attends_to():
    q, k, *_ = arrays()
    spec = catalog.native_sparse_attention(4, score="importance", **NSA)
    found = catalog.nsa_importance(q, k, spec.terms[0], block=8)
    short = np.einsum("ji,bihd->bjhd", pooling(SEQ, 6, 4), np.asarray(k, np.float64))
    wanted = importance_by_loops(q, short)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Beside the first block and the last two, the best other one of the last query.
    chosen = sa.select(spec, q, k, operands={"importance": found})
    pairs = spec.terms[1].dense(
        SEQ, num_heads=HEADS, operands={n: np.asarray(x)[0] for n, x in chosen.items()}
    )
    by_block = pairs[:, -1, :40].reshape(HEADS, 5, 8).all(axis=-1)
    best = wanted[0, :, -1, 1:4].argmax(axis=-1) + 1
    for h in range(HEADS):
        assert set(np.flatnonzero(by_block[h])) == {0, best[h // 2], 4}


@pytest.mark.slow
def test_native_sparse_attention_with_keys_of_each_branch():
    """Chosen by the attention to the compressed keys that the layer made."""
    spec = catalog.native_sparse_attention(4, own_keys=True, **NSA)
    assert sa.parse(repr(spec)) == spec
    q, k, v, do, gates = arrays()
    rng = np.random.default_rng(4)
    sizes = {"short_k": 10, "short_v": 10, "near_k": SEQ, "near_v": SEQ}
    own = {
        name: jnp.asarray(rng.normal(size=(BATCH, n, KV_HEADS, DIM)), jnp.float32)
        for name, n in sizes.items()
    }

    @partial(jax.jit, compiler_options=QUICK)
    def call(do, q, k, v, own, gates):
        def attend(q, k, v, own, gates):
            given = {"gates": gates, **own}
            return sa.attention(q, k, v, spec, operands=given, impl="xla", config=SMALL)

        out, pull = jax.vjp(attend, q, k, v, own, gates)
        chosen = sa.select(spec.terms[1], q, k, operands={"short_k": own["short_k"]})
        return chosen, (out, *pull(do))

    chosen, found = call(do, q, k, v, own, gates)
    (chosen,) = chosen.values()
    by_block = np.zeros((BATCH, HEADS, SEQ, 6), bool)
    score = importance_by_loops(q, own["short_k"])
    for b, h, i in np.ndindex(BATCH, HEADS, SEQ):
        forced = {0, i // 8, max(0, i // 8 - 1)}
        others = sorted(
            set(range(i // 8)) - forced, key=lambda c: -score[b, h // 2, i, c]
        )
        by_block[b, h, i, [*forced, *others[: 4 - len(forced)]]] = True
    np.testing.assert_array_equal(np.asarray(chosen), by_block)
    pairs = np.repeat(by_block, 8, axis=-1)[..., :SEQ] & np.tri(SEQ, dtype=bool)

    @partial(jax.jit, compiler_options=QUICK)
    def by_definition(do, *args):
        out, pull = jax.vjp(partial(own_keys_by_definition, chosen=pairs), *args)
        return out, *pull(do)

    with jax.enable_x64(True):
        args = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (do, q, k, v, own, gates)
        )
        wanted = by_definition(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        oracle.assert_close(a, np.asarray(b), "float32", "own keys")


def test_key_functions_have_no_place_beside_own_keys():
    with pytest.raises(ValueError, match="key='phi', value=None with own_keys=True"):
        catalog.native_sparse_attention(key="phi", own_keys=True)


def test_linear_attention_and_a_window():
    q, k, v, _, gates = arrays()
    gates = gates[..., :2]
    spec = catalog.linear_and_window(5)
    assert sa.parse(repr(spec)) == spec

    @partial(jax.jit, compiler_options=QUICK)
    def call(q, k, v, gates):
        return sa.attention(q, k, v, spec, operands={"gates": gates}, config=SMALL)

    q_, k_, v_ = (np.asarray(x, np.float64) for x in (q, k, v))
    k_, v_ = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k_, v_))
    at = np.arange(SEQ)
    distance = (at[:, None] - at[None, :])[None, None]
    exact = np.exp(np.einsum("bihd,bjhd->bhij", q_, k_) * DIM**-0.5)
    exact *= (distance >= 0) & (distance <= 5)
    fq, fk = (np.where(x > 0, x + 1, np.exp(x)) for x in (q_, k_))
    features = np.einsum("bihd,bjhd->bhij", fq, fk) * (distance >= 0)
    wanted = 0
    for m, weights in enumerate((exact, features)):
        shares = weights / weights.sum(axis=-1, keepdims=True)
        out = np.einsum("bhij,bjhd->bihd", shares, v_)
        wanted = wanted + np.asarray(gates)[..., m, None] * out
    oracle.assert_close(call(q, k, v, gates), wanted, "float32")


@pytest.mark.sample(3)
@pytest.mark.parametrize("length", [1, 5, 6, 13])
def test_compressed_blocks_of_short_sequences(length):
    """Queries before the end of the first block see nothing."""
    rng = np.random.default_rng(length)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, length, 2, 4)), jnp.float32) for _ in range(3)
    )
    term = sa.compressed(6, 4)
    assert term.num_blocks(length) == {1: 0, 5: 0, 6: 1, 13: 2}[length]

    @partial(jax.jit, compiler_options=QUICK)
    def call(q, k, v):
        attend = partial(sa.attention, spec=term, return_lse=True)
        (out, lse), pull = jax.vjp(attend, q, k, v)
        zero = jnp.zeros_like(lse)
        return out, lse, pull((jnp.ones_like(out), zero))

    out, lse, gradients = call(q, k, v)
    np.testing.assert_array_equal(out[:, :5], 0)
    assert np.isneginf(lse[:, :, :5]).all()
    assert np.isfinite(lse[:, :, 5:]).all()
    assert all(np.isfinite(g).all() for g in gradients)
    if length >= 6:
        # One block: its mean value, whatever the scores.
        np.testing.assert_allclose(out[0, 5], v[0, :6].mean(axis=0), atol=1e-6)


def test_compressed_by_functions_and_both_ways():
    q, k, v, *_ = arrays()
    blocks = pooling(SEQ, 6, 4) > 0
    starts = blocks.argmax(axis=1)

    def first(x):
        return x[:, :, 0]

    given = {"a": first, "b": first}
    spec = sa.compressed(6, 4, key="a", value="b", causal=False)
    assert sa.parse(repr(spec)) == spec
    found = sa.attention(q, k, v, spec, operands=given, impl="reference")
    wanted = sa.attention(q, k[:, starts], v[:, starts], sa.full(), impl="reference")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_cannot_be_compressed_is_refused():
    q, k, v, *_ = arrays()
    for options, message in (
        ({"length": 0}, r"length.*0.*at least 1"),
        ({"stride": 0}, r"stride.*0.*at least 1"),
        ({"key": "not a name"}, r"key='not a name' must be None or the name"),
    ):
        with pytest.raises(ValueError, match=message):
            sa.compressed(**options)
    spec = sa.compressed(6, 4, value="b")
    with pytest.raises(ValueError, match=r"compresses by 'b', which was not given"):
        sa.attention(q, k, v, spec)
    with pytest.raises(TypeError, match=r"operand 'b' .* must be a function"):
        sa.attention(q, k, v, spec, operands={"b": k})
    with pytest.raises(ValueError, match=r"'b' returned shape \(2, 10, 6, 2, 6\)"):
        sa.attention(q, k, v, spec, operands={"b": lambda x: x})
    with pytest.raises(ValueError, match=r"'a' was given, but no part"):
        sa.attention(q, k, v, spec, operands={"a": lambda x: x})


def test_compressed_blocks_share_a_softmax_with_tokens():
    q, k, v, *_ = arrays()
    near, blocks = sa.causal() & sa.window(3), sa.compressed(4, 4)
    out, lse = sa.attention(q, k, v, sa.joint(near, blocks), return_lse=True)
    parts = [sa.attention(q, k, v, x, return_lse=True) for x in (near, blocks)]
    top = np.logaddexp(*(np.asarray(x[1], np.float64) for x in parts))
    np.testing.assert_allclose(lse, top, atol=2e-6)
    share = [np.exp(np.asarray(x[1], np.float64) - top) for x in parts]
    for both in (sa.joint(near, blocks), sa.joint(near, sa.weighted(blocks, 1.0))):
        wanted = near.dense(16) | blocks.seen.dense(16)
        np.testing.assert_array_equal(both.seen.dense(16), wanted)
    assert sa.joint(near, sa.over("entries", sa.full())).seen is None
    pairs = zip(share, parts, strict=True)
    wanted = sum(np.swapaxes(s, 1, 2)[..., None] * np.asarray(x[0]) for s, x in pairs)
    np.testing.assert_allclose(out, wanted, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "stride"), [(4, 2), (4, 4), (3, 5), (1, 1)])
def test_the_tokens_that_compressed_blocks_hold(length, stride, causal):
    term = sa.compressed(length, stride, causal=causal)
    for n in (2, 13, 24):
        wanted = np.zeros((n, n), bool)
        for block in range(term.num_blocks(n)):
            start = block * stride
            for query in range(n):
                if not causal or start + length <= query + 1:
                    wanted[query, start : start + length] = True
        np.testing.assert_array_equal(term.seen.dense(n)[0], wanted)


def test_importance_of_other_lengths_is_refused():
    sizes = {"block": 4, "length": 4, "stride": 4}
    spec = catalog.native_sparse_attention(2, score="scores", **sizes)
    q, k = np.zeros((1, 8, 2, 4), np.float32), np.zeros((1, 12, 2, 4), np.float32)
    with pytest.raises(ValueError, match="q has 8 tokens, k has 12"):
        catalog.nsa_importance(q, k, spec.terms[0], block=4)
