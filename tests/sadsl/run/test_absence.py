"""Keys that no query sees, and queries that see no key, may hold NaN."""

import calls
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa

GARBAGE = (np.nan, np.inf, -np.inf, 1e35, -3e38)
NAMES = ("o", "lse", "dq", "dk", "dv")
LEAST = float(np.finfo(np.float32).min)
N = 70
# The kernels in their interpreters take long: some of their tests are for later.
IMPLS = [
    pytest.param(x, marks=pytest.mark.slow) if x in ("tpu", "triton") else x
    for x in calls.IMPLS
]


def spoilt(x, rows, seed, batch=None):
    """``x [batch, seq, ...]`` with garbage in ``rows``, or zeros there if no seed."""
    x, at = np.array(x), np.flatnonzero(rows)
    where = np.s_[:, at] if batch is None else np.s_[batch, at]
    found = np.zeros(x[where].shape)
    if seed is not None:
        rng = np.random.default_rng(seed)
        found = np.where(rng.random(found.shape) < 0.5, rng.choice(GARBAGE), found)
        found[..., 0] = rng.choice(GARBAGE[:3])
    x[where] = found
    return jnp.asarray(x)


def results(impl, spec, q, k, v, do, **options):
    """Values, lse and gradients of one call; a term without an lse has zeros."""
    options = calls.BACKENDS[impl] | {"impl": impl} | options
    has_lse = options.pop("has_lse", True)

    @jax.jit
    def run(q, k, v, do):
        def call(q, k, v):
            out = sa.attention(q, k, v, spec, return_lse=has_lse, **options)
            out, lse = out if has_lse else (out, jnp.zeros(()))
            # -inf of an empty row is constant.
            return out, jnp.where(jnp.isneginf(lse), 0.0, lse), lse

        (out, _, lse), pull = jax.vjp(call, q, k, v)
        dlse = jnp.cos(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
        return out, lse, *pull((do, dlse, jnp.zeros_like(lse)))

    return [np.asarray(x.astype(jnp.float32)) for x in run(q, k, v, do)]


def assert_same(impl, found, wanted, what=""):
    """Bit for bit, but for kernels that walk a row again: that may round otherwise."""
    exact = impl in ("reference", "xla")
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    tolerance = 0 if exact else 1e-5
    np.testing.assert_allclose(
        found, wanted, rtol=tolerance, atol=tolerance, err_msg=f"{impl} {what}"
    )


def assert_ignored(impl, spec, pairs, arrays, *, seed=1, **options):
    """Garbage in what is in no pair is worth what zeros there are."""
    q, k, v, do = arrays
    unseen, blind = ~pairs.any(axis=-2), ~pairs.any(axis=-1)

    def of(seed):
        rows = [spoilt(x, blind, s) for x, s in ((q, seed), (do, seed))]
        keys = [spoilt(x, unseen, s) for x, s in ((k, seed), (v, seed))]
        return results(impl, spec, rows[0], *keys, rows[1], **options)

    for name, found, wanted in zip(NAMES, of(seed), of(None), strict=True):
        assert_same(impl, found, wanted, f"{spec!r} {name}")
        assert not np.isnan(found).any(), name


def holes(map):
    """A map without some keys and queries of most blocks."""
    return (
        (map - sa.keys(5, 9) - sa.keys(40, 41) - sa.keys(64, 70))
        - sa.queries(3, 4)
        - sa.queries(50, 70)
    )


MAPS = {
    "causal": sa.causal(),
    "window": sa.causal() & (sa.window(20) | sa.sinks(2)),
    "strided": sa.causal() & sa.strided(3),
}


@pytest.mark.slow
@pytest.mark.parametrize("impl", calls.IMPLS)
@pytest.mark.parametrize("name", [*MAPS][1:2])
def test_nothing_comes_of_what_is_in_no_pair(impl, name):
    spec = holes(MAPS[name])
    pairs = np.asarray(spec.dense(N, N))[0]
    assert_ignored(impl, spec, pairs, calls.arrays(batch=1, heads=2, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("impl", calls.IMPLS)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "cap", "sink", "dropout", "bias", "alibi"])
def test_nothing_comes_of_it_whatever_the_term(impl, name, dtype, kind):
    options = {}
    spec = holes(MAPS[name])
    pairs = np.asarray(spec.dense(N, N))[0]
    match kind:
        case "cap":
            spec = sa.softmax(spec, logits_soft_cap=5.0)
        case "sink":
            spec = sa.softmax(spec, sink="s")
            options["operands"] = {"s": jnp.asarray([0.5, -1.0])}
        case "dropout":
            options |= {"dropout_rate": 0.4, "dropout_key": jax.random.key(3)}
        case "bias":
            spec = sa.softmax(spec, bias=sa.key_bias("b"))
            bias = np.random.default_rng(2).normal(size=(1, 2, N)).astype(np.float32)
            options["operands"] = {"b": jnp.asarray(bias)}
        case "alibi":
            spec = sa.softmax(spec, bias=sa.alibi())
    arrays = [x.astype(dtype) for x in calls.arrays(batch=1, heads=2, kv_heads=1)]
    assert_ignored(impl, spec, pairs, arrays, **options)


@pytest.mark.slow
@settings(max_examples=few(25))
@given(
    map=strategies.composed(5),
    impl=st.sampled_from(calls.IMPLS),
    seed=st.integers(0, 9),
)
def test_nothing_comes_of_it_in_any_map(map, impl, seed):
    spec = map - sa.keys(7, 12) - sa.queries(20, 23)
    pairs = np.asarray(spec.dense(N, N))[0]
    arrays = calls.arrays(batch=1, heads=2, kv_heads=2, seed=seed)
    assert_ignored(impl, spec, pairs, arrays, seed=seed)


@pytest.mark.parametrize("impl", calls.IMPLS)
def test_a_key_reaches_the_outputs_of_who_sees_it_alone(impl):
    q, k, v, _ = calls.arrays(batch=1, heads=2, kv_heads=2)
    options = calls.BACKENDS[impl] | {"impl": impl, "return_lse": True}
    for bad in GARBAGE[:3]:
        out, lse = sa.attention(q, k.at[:, 40].set(bad), v, sa.causal(), **options)
        wanted, lse_wanted = sa.attention(q, k, v, sa.causal(), **options)
        assert_same(impl, out[:, :40], wanted[:, :40])
        assert_same(impl, lse[..., :40], lse_wanted[..., :40])
        if np.isnan(bad):
            assert np.isnan(out[:, 40:]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_value_that_is_no_number_shows_in_who_sees_it(impl):
    q, k, v, do = calls.arrays(batch=1, heads=2, kv_heads=2)
    found = results(impl, sa.causal(), q, k, v.at[:, 40].set(jnp.nan), do)
    assert np.isnan(found[0][:, 40:]).all()
    # Not in the blocks before, of 32 or 128 keys.
    if impl in ("tpu", "triton"):
        assert not np.isnan(found[0][:, :32]).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_another_document_and_an_unused_cache_may_hold_anything(impl):
    q, k, v, do = calls.arrays(batch=1, heads=2, kv_heads=1)
    # 9 marks padding of the keys, which no query has.
    ids = np.array([[0] * 20 + [1] * 30 + [2] * 20])
    kv_ids = np.where((np.arange(N) >= 60) | (np.arange(N) == 7), 9, ids)
    spec, given = sa.causal() & sa.segments(), {"q_segment_ids": ids}
    pairs = (ids[0][:, None] == kv_ids[0]) & np.tri(N, dtype=bool)
    assert_ignored(
        impl, spec, pairs, (q, k, v, do), kv_segment_ids=jnp.asarray(kv_ids),
        q_segment_ids=jnp.asarray(given["q_segment_ids"]),
    )  # fmt: skip
    pairs = np.tri(3, N, 40, dtype=bool)
    args = q[:, :3], k, v, do[:, :3]
    assert_ignored(impl, sa.causal(), pairs, args, q_offset=40)


MIXTURES = {
    "joint": sa.joint(sa.causal() & sa.window(9), sa.causal() & sa.strided(7)),
    "average": sa.average(sa.causal() & sa.window(9), sa.causal()),
    "linear": sa.linear("elu1", map=sa.causal()),
    "linear, decay": sa.linear("elu1", decay=(0.9, 0.8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("name", MIXTURES)
def test_terms_ignore_an_unused_cache(impl, name):
    q, k, v, do = calls.arrays(batch=1, heads=2, kv_heads=2)
    pairs = np.tri(10, N, 40, dtype=bool)
    has_lse = name not in ("average",)
    args = q[:, :10], k, v, do[:, :10]
    spec = MIXTURES[name]
    assert_ignored(impl, spec, pairs, args, q_offset=40, has_lse=has_lse)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("map", [sa.causal() & sa.segments(), sa.segments()], ids=repr)
def test_linear_attention_ignores_documents_that_no_query_has(impl, map):
    q, k, v, do = calls.arrays(batch=1, heads=2, kv_heads=2)
    ids = np.array([[0] * 20 + [1] * 30 + [2] * 20])
    kv_ids = np.where((np.arange(N) >= 60) | (np.arange(N) < 4), 9, ids)
    pairs = ids[0][:, None] == kv_ids[0]
    if map != sa.segments():
        pairs &= np.tri(N, dtype=bool)
    given = {"q_segment_ids": jnp.asarray(ids), "kv_segment_ids": jnp.asarray(kv_ids)}
    assert_ignored(impl, sa.linear("elu1", map=map), pairs, (q, k, v, do), **given)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_linear_attention_forgets_a_document_that_is_no_number(impl):
    q, k, v, _ = calls.arrays(batch=1, q_len=600, kv_len=600, heads=2, kv_heads=2)
    ids = jnp.asarray([[0] * 100 + [1] * 500])
    options = {"q_segment_ids": ids, "kv_segment_ids": ids, "impl": impl}
    options |= {n: x for n, x in calls.BACKENDS[impl].items() if n != "config"}
    spec = sa.linear("elu1", map=sa.causal() & sa.segments())
    out = sa.attention(q, k, v.at[:, 50].set(jnp.nan), spec, **options)
    wanted = sa.attention(q, k, v, spec, **options)
    # What it does to its own chunk is documented; the state forgets it.
    np.testing.assert_array_equal(out[:, 512:], wanted[:, 512:])


def biased(q, k, v, do, bias, pairs):
    """What ``results`` says, in float64, of biases ``[q, kv]``; ``-inf`` is absence."""
    pairs, scale = pairs & ~np.isneginf(bias), q.shape[-1] ** -0.5
    q, k, v, do = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v, do))
    # float32 absorbs a score in a bias as large as this.
    s = (q @ np.swapaxes(k, -1, -2) * scale).astype(np.float32)
    s = (s + np.where(pairs, bias, 0).astype(np.float32)).astype(np.float64)
    s = np.where(pairs, s, -np.inf)
    some = pairs.any(axis=-1, keepdims=True)
    top = np.where(some, s.max(axis=-1, keepdims=True), 0)
    p = np.exp(s - top)
    l = np.where(some, p.sum(axis=-1, keepdims=True), 1)
    p = p / l
    o, lse = p @ v, np.where(some, top + np.log(l), -np.inf)
    dlse = np.cos(np.arange(lse.size)).reshape(lse.shape)
    ds = p * (do @ np.swapaxes(v, -1, -2) - (do * o).sum(-1, keepdims=True) + dlse)
    found = o, ds @ k * scale, np.swapaxes(ds, -1, -2) @ q * scale
    o, dq, dk, dv = (
        np.swapaxes(x, 1, 2) for x in (*found, np.swapaxes(p, -1, -2) @ do)
    )
    return o, lse[..., 0], dq, dk, dv


@pytest.mark.parametrize("impl", calls.IMPLS)
def test_biases_of_any_finite_size_are_scores_and_minus_infinity_is_absence(impl):
    q, k, v, do = calls.arrays(batch=1, heads=2, kv_heads=2)
    rng = np.random.default_rng(4)
    bias = rng.normal(size=(N, N)).astype(np.float32)
    bias[:10] = LEAST
    bias[10:20, :64] = np.where(rng.random((10, 64)) < 0.5, LEAST, -2.5e38)
    bias[20:30] = np.where(rng.random((10, N)) < 0.5, -np.inf, LEAST)
    bias[30:40] = -np.inf
    bias[40:45, ::2] = -1e30
    bias[:, 33] = -np.inf
    pairs = np.tri(N, dtype=bool)
    spec = sa.softmax(sa.causal(), bias=sa.pair_bias("b"))
    given = {"operands": {"b": jnp.asarray(bias)[None, None]}}
    found = results(impl, spec, q, k, v, do, **given)
    wanted = biased(q, k, v, do, bias, pairs)
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        if name != "lse":
            oracle.assert_close(a, b, "float32", f"{impl} {name}")
    lse, lse_wanted = found[1], wanted[1]
    finite = np.isfinite(lse_wanted)
    np.testing.assert_array_equal(np.isneginf(lse), ~finite)
    np.testing.assert_allclose(lse[finite], lse_wanted[finite], rtol=1e-5, atol=1e-4)
    # A key that biases leave to no query may hold anything.
    pairs = pairs & ~np.isneginf(bias)
    assert_ignored(impl, spec, pairs, (q, k, v, do), **given)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_any_finite_size_are_scores(impl):
    q, k, v, do = calls.arrays(batch=1, heads=1, kv_heads=1)
    q, k = q * 1e18, k * 1e18
    spec = sa.causal() & sa.window(9)
    out, lse, *_ = results(impl, spec, q, k, v, do)
    wide_q, wide_k = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k))
    s = np.where(spec.dense(N, N)[0], wide_q @ wide_k.T * 16**-0.5, -np.inf)
    top = s.max(axis=-1)
    np.testing.assert_allclose(lse[0, 0], top, rtol=1e-4)
    # One key has all the weight, where float32 can tell it from the next.
    second = np.sort(s, axis=-1)[:, -2]
    clear = top - second > 1e-3 * np.abs(s[np.isfinite(s)]).max()
    assert clear.sum() > 50
    wanted = np.asarray(v)[0, s.argmax(axis=-1), 0]
    np.testing.assert_array_equal(out[0, clear, 0], wanted[clear])
