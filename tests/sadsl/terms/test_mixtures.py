"""Joints, averages, gates, weights and sinks against float64."""

from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import strategies
from calls import BACKENDS, arrays
from hypothesis import given, settings
from laws import few

import sadsl as sa
from lowering.problem import Problem
from sadsl.terms import overlaps

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

NEAR = sa.causal() & sa.window(9)
FAR = sa.causal() & sa.strided(7)
FIRST = sa.causal() & sa.sinks(3)


def in_float64(function, *values):
    """``function`` of the arrays in float64, heads in front, keys repeated."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in values]
        return jax.tree.map(np.asarray, function(*wide))


def scores(q, k, cap=None):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return s if cap is None else cap * jnp.tanh(s / cap)


def softmax_of(s, pairs, v, extra=None):
    """One normaliser over scores where pairs are allowed, and one extra logit."""
    v = jnp.repeat(v, s.shape[1] // v.shape[2], axis=2)
    pairs = jnp.broadcast_to(pairs, s.shape)
    weights = jnp.where(pairs, jnp.exp(s), 0.0)
    total = weights.sum(-1, keepdims=True)
    if extra is not None:
        total = total + jnp.exp(extra)[..., :, None, None]
    safe = jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / safe, v)


def gradients(function, do, *values):
    def loss(*values):
        return jnp.sum(function(*values) * jnp.asarray(do, values[0].dtype))

    return function(*values), *jax.grad(loss, tuple(range(len(values))))(*values)


def check(spec, wanted, impl="xla", given=None, *, sizes=None):
    """Values and gradients of q, k, v and the given arrays."""
    q, k, v, do = arrays(**(sizes or {}))
    given = given or {}

    def ours(q, k, v, *floats):
        operands = dict(zip(given, floats, strict=True))
        return sa.attention(
            q, k, v, spec, operands=operands, impl=impl, **BACKENDS[impl]
        )

    found = gradients(ours, do, q, k, v, *given.values())
    expected = in_float64(
        lambda *x: gradients(wanted, do, *x), q, k, v, *given.values()
    )
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        oracle.assert_close(a, b, "float32", f"{impl} {spec!r} {i}")


# ---- joint


KERNELS = [pytest.param(x, marks=pytest.mark.slow) for x in ("tpu", "triton")]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "xla", *KERNELS])
def test_a_joint_of_different_options_is_one_normaliser(impl):
    spec = sa.joint(sa.softmax(NEAR, 5.0), FAR, sa.softmax(FIRST, 5.0))
    assert len(spec.resolved(70)) >= 2
    near, far, first = (m.dense(70)[None] for m in (NEAR, FAR, FIRST))
    capped = jnp.asarray(near | (first & ~far))
    assert (near & far).any()
    assert (first & ~near & ~far).any()

    def wanted(q, k, v):
        s = jnp.where(capped, scores(q, k, 5.0), scores(q, k))
        return softmax_of(s, jnp.asarray(near | far | first), v)

    check(spec, wanted, impl)


def test_a_joint_of_maps_is_the_softmax_over_their_union():
    q, k, v, _ = arrays()
    union = NEAR | FAR | FIRST
    for overlap in ("remove", "count"):
        spec = sa.joint(NEAR, sa.joint(FAR, FIRST), overlap=overlap)
        assert sa.parse(repr(spec)) == spec
    spec = sa.joint(NEAR, sa.joint(FAR, FIRST))
    assert spec.resolved(70) == (sa.softmax(union),)
    assert sa.plan(spec, 70).num_pairs == union.dense(70).sum()
    assert sa.properties(spec, 70).causal
    out, lse = sa.attention(q, k, v, spec, return_lse=True)
    wanted, wanted_lse = sa.attention(q, k, v, union, return_lse=True)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)


def test_maps_that_one_plan_would_serve_badly_are_merged():
    # Each alone is dense in an order of its own; their union is in none.
    n = 2048
    spec = sa.joint(sa.causal() & sa.window(200), sa.causal() & sa.strided(64))
    parts = spec.resolved(n)
    assert len(parts) == 2
    assert overlaps.meeting(parts[0].map, parts[1].map, Problem(n, n)) == "never"
    q, k, v, _ = arrays(1, n, n, 1, 1, 8, 8)
    out, lse = sa.attention(q, k, v, spec, return_lse=True)
    whole = sa.causal() & (sa.window(200) | sa.strided(64))
    wanted, wanted_lse = sa.attention(q, k, v, whole, return_lse=True)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-6)


@settings(max_examples=few(60), deadline=None)
@given(strategies.composed(3), strategies.composed(3), strategies.composed(3))
def test_resolved_terms_are_disjoint_and_cover(a, b, c):
    n, heads = 23, 2
    terms = sa.softmax(a, 3.0), sa.softmax(b), sa.softmax(c, 3.0)
    problem = Problem(n, n, heads)
    found = sa.joint(*terms).resolved(n, num_heads=heads)
    masks = [overlaps.support(x).dense(n, num_heads=heads) for x in found]
    every = [m.dense(n, num_heads=heads) for m in (a, b, c)]
    np.testing.assert_array_equal(sum(m.astype(int) for m in masks), reduce(or_, every))
    met = overlaps.meeting(a, b, problem)
    assert (met == "never") == (not (every[0] & every[1]).any())
    if met != "never":
        head, query, key = met
        assert every[0][head, query, key]
        assert every[1][head, query, key]


@pytest.mark.slow
def test_pairs_that_two_terms_claim_are_refused_counted_or_removed():
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match="query 0 and key 0 of head 0 are in both"):
        sa.attention(q, k, v, sa.joint(NEAR, FAR, overlap="refuse"))
    apart = sa.joint(NEAR, FAR - NEAR, overlap="refuse")
    np.testing.assert_allclose(
        sa.attention(q, k, v, apart), sa.attention(q, k, v, NEAR | FAR), atol=1e-6
    )

    def twice(q, k, v):
        times = np.sum([m.dense(70)[None] for m in (NEAR, FAR)], axis=0)
        some = np.maximum(times, 1)
        return softmax_of(scores(q, k) + np.log(some), jnp.asarray(times > 0), v)

    check(sa.joint(NEAR, FAR, overlap="count"), twice)


@pytest.mark.slow
def test_what_content_decides_gives_up_pairs_at_run_time():
    q, k, *_ = arrays()
    best = sa.causal() & sa.topk(2, block=8)
    spec = sa.joint(NEAR, sa.softmax(best, 5.0))
    chosen = sa.select(spec, q, k)
    held = [{n: np.asarray(x)[b] for n, x in chosen.items()} for b in range(2)]
    pairs = [
        np.stack([m.dense(70, num_heads=4, operands=x) for x in held])
        for m in (NEAR, best)
    ]

    def wanted(q, k, v):
        s = jnp.where(pairs[0], scores(q, k), scores(q, k, 5.0))
        return softmax_of(s, jnp.asarray(pairs[0] | pairs[1]), v)

    check(spec, wanted)
    with pytest.raises(ValueError, match="content decides whether they share a pair"):
        sa.joint(NEAR, best, overlap="refuse").resolved(70)
    documents = sa.causal() & sa.segments()
    spec = sa.joint(
        documents & sa.window(4), documents - sa.window(4), overlap="refuse"
    )
    assert spec.resolved(70)


# ---- Sinks, weights, averages, gates


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_sinks_join_the_normaliser(impl):
    spec = sa.softmax(NEAR & sa.queries(3, 80), 5.0, sink=True)
    assert sa.parse(repr(spec)) == spec
    pairs = jnp.asarray(spec.map.dense(70))

    def wanted(q, k, v, sink):
        return softmax_of(scores(q, k, 5.0), pairs, v, sink[None])

    sinks = jnp.asarray([0.3, -2.0, 4.0, 0.0], jnp.float32)
    check(spec, wanted, impl, {"sink": sinks})
    q, k, v, _ = arrays()
    _, lse = sa.attention(q, k, v, spec, operands={"sink": sinks}, return_lse=True)
    np.testing.assert_allclose(lse[:, :, 0], np.broadcast_to(sinks, (2, 4)), atol=1e-6)


def test_a_sink_of_a_joint_counts_once():
    q, k, v, _ = arrays()
    given = {"sink": jnp.ones(4)}
    spec = sa.joint(sa.softmax(NEAR, sink=True), sa.softmax(FAR, sink=True))
    whole = sa.softmax(NEAR | FAR, sink=True)
    np.testing.assert_allclose(
        sa.attention(q, k, v, spec, operands=given),
        sa.attention(q, k, v, whole, operands=given), atol=1e-6,
    )  # fmt: skip


@pytest.mark.slow
def test_weights_average_and_gates():
    near, far = (jnp.asarray(m.dense(70)[None]) for m in (NEAR, FAR - NEAR))

    def heavier(q, k, v):
        s = scores(q, k) + jnp.where(far, np.log(3.0), 0.0)
        return softmax_of(s, near | far, v)

    check(sa.joint(NEAR, sa.weighted(FAR - NEAR, float(np.log(3.0)))), heavier)

    def parts(q, k, v):
        return softmax_of(scores(q, k), near, v), softmax_of(scores(q, k), far, v)

    def mean(q, k, v):
        return sum(parts(q, k, v)) / 2

    check(sa.average(NEAR, FAR - NEAR), mean)

    def through_gates(q, k, v, gates):
        a, b = parts(q, k, v)
        return gates[..., 0, None] * a + gates[..., 1, None] * b

    rng = np.random.default_rng(3)
    gates = jnp.asarray(rng.normal(size=(2, 70, 4, 2)), jnp.float32)
    spec = sa.gated(NEAR, FAR - NEAR, gates="g")
    assert sa.parse(repr(spec)) == spec
    check(spec, through_gates, "xla", {"g": gates})


def test_mixtures_nest_and_work_by_head():
    q, k, v, _ = arrays()
    inner = sa.gated(NEAR, sa.average(FAR, sa.softmax(FIRST, sink="s")))
    spec = sa.heads((inner, 2), (sa.joint(NEAR, FAR), 2))
    gates = jnp.ones((70, 2, 2)) / 2
    given = {"gates": gates, "s": jnp.zeros(2)}
    out = sa.attention(q, k, v, spec, operands=given)
    one = sa.attention(q[:, :, :2], k[:, :, :1], v[:, :, :1], inner, operands=given)
    two = sa.attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], NEAR | FAR)
    np.testing.assert_allclose(out, np.concatenate([one, two], 2), atol=1e-6)
    with pytest.raises(NotImplementedError, match="more than one normaliser"):
        sa.attention(q, k, v, spec, operands=given, return_lse=True)
    assert sa.properties(spec, 70, 4).num_pairs == (NEAR | FAR | FIRST).dense(70).sum()


@pytest.mark.slow
def test_empty_rows_of_all_parts_stay_empty():
    q, k, v, _ = arrays()
    late = sa.queries(20, 70)
    spec = sa.joint(sa.softmax(NEAR & late, 5.0), (FAR - NEAR) & late)
    (out, lse), pull = jax.vjp(
        lambda *x: sa.attention(*x, spec, return_lse=True), q, k, v
    )
    assert not np.asarray(out[:, :20]).any()
    assert np.isneginf(lse[:, :, :20]).all()
    for gradient in pull((jnp.ones_like(out), jnp.ones_like(lse))):
        assert np.isfinite(gradient).all()


BAD = [
    (lambda: sa.joint(), ValueError, "at least one spec"),
    (lambda: sa.joint(NEAR, 3), TypeError, "takes maps and terms, not 3"),
    (lambda: sa.joint(NEAR, overlap="add"), ValueError, "must be one of remove"),
    (lambda: sa.joint(sa.gated(NEAR)), ValueError, "no single normaliser"),
    (lambda: sa.gated(NEAR, FAR, gates=3), ValueError, "gates=3 must be the name"),
    (lambda: sa.weighted(3, 1.0), TypeError, "a map or a term, not 3"),
    (lambda: sa.weighted(NEAR, float("nan")), ValueError, "log_weight=nan must be"),
    (lambda: sa.softmax(NEAR, sink=3), ValueError, "sink=3 must be True"),
    (lambda: sa.softmax(NEAR, bias=3), TypeError, r"bias=3 must be a bias such as"),
    (lambda: sa.plan(sa.average(NEAR, FAR), 70), NotImplementedError, "of a part"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_specs(make, error, text):
    with pytest.raises(error, match=text):
        make()


BAD_CALLS = [
    (sa.gated(NEAR, FAR), {}, "which was not given"),
    (sa.gated(NEAR, FAR), {"gates": np.ones((70, 4, 3))}, r"must be \[batch or 1"),
    (sa.softmax(NEAR, sink=True), {}, "reads its sinks from 'sink'"),
    (sa.softmax(NEAR, sink=True), {"sink": np.ones(3)}, r"must have shape \(4,\)"),
    (sa.joint(NEAR, FAR), {"x": np.ones(3)}, "no part of joint"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "given", "text"), BAD_CALLS)
def test_bad_operands(spec, given, text):
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match=text):
        sa.attention(q, k, v, spec, operands=given)


def test_dropout_needs_a_rate_and_a_key():
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match=r"dropout_rate=1\.0 must be at least 0"):
        sa.attention(q, k, v, NEAR, dropout_rate=1.0, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="without dropout_key"):
        sa.attention(q, k, v, NEAR, dropout_rate=0.5)
