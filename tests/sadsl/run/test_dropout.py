"""Dropout through the public call: one mask on every backend, and its gradients."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from calls import BACKENDS, IMPLS, arrays

import sadsl as sa
from lowering.targets import compiling
from sadsl.terms.biases import distance_bias

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

RATE = 0.4
KEY = jax.random.key(5)
CALL = {"dropout_rate": RATE, "dropout_key": KEY}


def kept(spec, impl, q_len=26, kv_len=26, batch=2, heads=4, **options):
    """Which pairs keep their weight, read off values that name their key."""
    q, k, *_ = arrays(batch, q_len, kv_len, heads, 2, 8, 8)
    v = jnp.broadcast_to(jnp.eye(kv_len)[None, :, None], (batch, kv_len, 2, kv_len))
    options = BACKENDS[impl] | CALL | options
    call = jax.jit(lambda *x: sa.attention(*x, spec, impl=impl, **options))
    return np.asarray(call(q, k, v)).swapaxes(1, 2) > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize(
    "spec",
    [
        # In the given order, in that of residues, and in one that content decides.
        sa.causal(),
        sa.causal() & sa.strided(4),
        sa.softmax(sa.causal() & (sa.window(3) | sa.topk(2, block=4, scope="head"))),
    ],
    ids=["causal", "strided", "topk"],
)
def test_the_mask_is_the_same_on_every_backend(impl, spec):
    same = kept(spec, "reference")
    np.testing.assert_array_equal(kept(spec, impl), same)


@pytest.mark.slow
def test_the_mask_depends_on_nothing_but_key_entry_head_and_positions():
    every = kept(sa.full(), "reference")
    assert abs(every.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / every.size)
    causal = np.tril(np.ones((26, 26), bool))
    np.testing.assert_array_equal(kept(sa.causal(), "reference"), every & causal)
    config = sa.KernelConfig(block_q=8, block_kv=16, relayout=False)
    strided = sa.causal() & sa.strided(4)
    at = np.arange(26)
    pairs = causal & ((at[:, None] - at) % 4 == 0)
    np.testing.assert_array_equal(kept(strided, "xla", config=config), every & pairs)
    # The last queries of a cache, other lengths, fewer entries and heads.
    last = kept(sa.causal(), "xla", q_len=3, q_offset=23)
    np.testing.assert_array_equal(last, (every & causal)[:, :, 23:])
    fewer = kept(sa.full(), "xla", q_len=9, kv_len=13, batch=1, heads=2)
    np.testing.assert_array_equal(fewer, every[:1, :2, :9, :13])
    # Keys of either style, and another key.
    old = kept(sa.full(), "reference", dropout_key=jax.random.PRNGKey(5))
    np.testing.assert_array_equal(old, every)
    other = kept(sa.full(), "reference", dropout_key=jax.random.key(6))
    assert 0.4 < (other == every).mean() < 0.65


@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients_against_float64(impl):
    q, k, v, do = arrays(2, 26, 26, 4, 2, 8, 12)
    spec = sa.softmax(sa.causal() & ~sa.queries(4, 6), 3.0)
    factor = kept(spec, "reference") / (1 - RATE)
    pairs = np.tril(np.ones((26, 26), bool))
    pairs[4:6] = False

    def dense(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
        s = 3 * jnp.tanh(jnp.einsum("bhqd,bhkd->bhqk", q, k) * 8**-0.5 / 3)
        some = pairs.any(axis=1)[None, None, :]
        s = jnp.where(pairs[None, None], s, jnp.where(some[..., None], -jnp.inf, 0))
        lse = jax.nn.logsumexp(s, axis=-1)
        p = jnp.exp(s - lse[..., None]) * factor
        out = jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", p, v), 1, 2)
        return out, jnp.where(some, lse, 0)

    def call(q, k, v):
        out, lse = sa.attention(
            q, k, v, spec, impl=impl, return_lse=True, **CALL, **BACKENDS[impl]
        )
        return out, jnp.where(jnp.isneginf(lse), 0, lse)

    dlse = jnp.cos(jnp.arange(2 * 4 * 26, dtype=jnp.float32)).reshape(2, 4, 26)

    def both(f, do, dlse, *x):
        out, pull = jax.vjp(f, *x)
        return *out, *pull((do, dlse))

    found = jax.jit(partial(both, call))(do, dlse, q, k, v)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (do, dlse, q, k, v)]
        expected = both(dense, *wide)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        oracle.assert_close(a, np.asarray(b), "float32", f"{impl} {i}")


# ---- Parts of a spec


def drawn(part, path):
    """The call of a part by itself, whose key is what the docstring says."""
    key = KEY
    for i in path:
        key = jax.random.fold_in(key, i)
    return kept(part, "reference", dropout_key=key)


PARTS = sa.softmax(sa.full()), sa.softmax(sa.full(), 3.0)
A, B = PARTS
APART = {
    # The part, alone in what a mixture yields, and the path of its key.
    "average": (sa.average(A, sa.softmax(~sa.full())), A, (0,)),
    "second of average": (sa.average(sa.softmax(~sa.full()), B), B, (1,)),
    "in depth": (
        sa.average(~sa.full(), sa.weighted(sa.average(~sa.full(), B), 1.0)), B, (1, 1),
    ),
    "joint": (sa.joint(~sa.full(), A), A, ()),
    "counted": (sa.joint(~sa.full(), B, overlap="count"), B, (1,)),
    "counted in depth": (
        sa.joint(
            sa.joint(~sa.full(), ~sa.full(), overlap="count"), B, overlap="count"
        ), B, (2,),
    ),
    "counted by one, removed by the other": (
        sa.joint(sa.joint(~sa.full(), ~sa.full(), overlap="count"), B), B, (),
    ),
}  # fmt: skip


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", APART)
def test_each_part_draws_from_the_key_of_its_path(name):
    spec, part, path = APART[name]
    np.testing.assert_array_equal(kept(spec, "reference"), drawn(part, path))


def _independent(a, b):
    """Whether what two masks keep is no more alike than chance has it."""
    both = (1 - RATE) ** 2
    return abs((a & b).mean() - both) < 4 * np.sqrt(both * (1 - both) / a.size)


def test_parts_draw_independently():
    paths = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1)]
    found = [drawn(A, path) for path in paths]
    for i, a in enumerate(found):
        assert abs(a.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / a.size)
        assert all(_independent(a, b) for b in found[:i])


def weights(spec, impl="reference"):
    """The dropped weights of all pairs, float64, if every score is 0."""
    v = jnp.broadcast_to(jnp.eye(26)[None, :, None], (2, 26, 2, 26))
    q, k = jnp.zeros((2, 26, 4, 8)), jnp.zeros((2, 26, 2, 8))
    call = {**BACKENDS[impl], **CALL, "impl": impl}
    out = jax.jit(lambda *x: sa.attention(*x, spec, **call))(q, k, v)
    return np.asarray(out, np.float64).swapaxes(1, 2)


def test_a_pair_that_two_terms_count_is_dropped_twice():
    spec = sa.joint(sa.full(), sa.full(), overlap="count")
    times = np.rint(weights(spec) * 26 * 2 * (1 - RATE)).astype(int)
    first, second = kept(sa.full(), "reference"), drawn(A, (1,))
    np.testing.assert_array_equal(times, first.astype(int) + second)


def test_a_joint_drops_what_one_softmax_drops():
    near = sa.causal() & sa.window(5)
    far = sa.causal() - sa.window(5)
    one = kept(sa.causal(), "xla")
    several = sa.joint(sa.softmax(near, 4.0), far, overlap="refuse")
    assert len(several.resolved(26)) == 2
    for spec in (sa.joint(near, far), several, sa.joint(sa.causal(), near)):
        np.testing.assert_array_equal(kept(spec, "xla"), one)


def test_keys_that_are_no_tokens_draw_their_own():
    of_regions = sa.summaries(sa.spans(2))
    spec = sa.joint(sa.causal() & sa.blocks(2), of_regions)
    q, k, *_ = arrays(2, 26, 26, 2, 2, 8, 8)
    v = jnp.broadcast_to(jnp.eye(26)[None, :, None], (2, 26, 2, 26))
    out = np.asarray(sa.attention(q, k, v, spec, impl="xla", **CALL)).swapaxes(1, 2)
    # Tokens 2j and 2j + 1 are in region j, whose weight is theirs.
    regions = (out[..., ::2] > 0) | (out[..., 1::2] > 0)
    tokens = kept(sa.full(), "reference", heads=2)[..., :13]
    past = np.broadcast_to(np.arange(26)[:, None] // 2 > np.arange(13), tokens.shape)
    assert not (regions == tokens)[past].all()
    assert _independent(regions[past], tokens[past])


COUNTED = sa.joint(sa.causal(), sa.softmax(sa.full(), 2.0), overlap="count")
SEVERAL = [
    sa.average(sa.causal(), COUNTED),
    sa.gated(sa.causal(), sa.joint(sa.full(), sa.softmax(sa.full(), 2.0))),
    sa.heads((sa.average(sa.causal(), sa.full()), 2), (sa.causal(), 2)),
]


# Of the keys that their parts draw from.
PATHS = [[(0,), (1,), (1, 1)], [(0,), (1,)], [(0, 0), (0, 1), (1,)]]


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_mixtures_drop_alike_on_every_backend(impl):
    check_dropped(impl, SEVERAL[0])


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", SEVERAL[1:], ids=["gated", "heads"])
def test_more_mixtures_drop_alike_on_every_backend(impl, spec):
    check_dropped(impl, spec)


def check_dropped(impl, spec):
    """Values and gradients against the definition with the masks of the paths."""
    q, k, v, do = arrays(2, 26, 26, 4, 2, 8, 12)
    gates = jnp.cos(jnp.arange(26 * 4 * 2, dtype=jnp.float32)).reshape(26, 4, 2)
    given = {"gates": gates} if spec == SEVERAL[1] else {}

    def call(q, k, v):
        options = {**BACKENDS[impl], **CALL, "impl": impl, "operands": given}
        return sa.attention(q, k, v, spec, **options)

    def both(f, do, *x):
        out, pull = jax.vjp(f, *x)
        return out, *pull(do)

    found = jax.jit(partial(both, call))(do, q, k, v)
    at = {path: drawn(sa.full(), path) for path in PATHS[SEVERAL.index(spec)]}
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (do, q, k, v)]
        dense = partial(dropped, spec, at=at, gates=np.asarray(gates, np.float64))
        expected = both(dense, *wide)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        oracle.assert_close(a, np.asarray(b), "float32", f"{impl} {spec!r} {i}")


def dropped(spec, q, k, v, *, at, gates):
    """The specs of ``SEVERAL`` by hand, with the masks ``at`` their paths."""
    full, causal = np.ones((26, 26), bool), np.tril(np.ones((26, 26), bool))

    def scores(cap=None):
        wide = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, wide) * 8**-0.5
        return s if cap is None else cap * jnp.tanh(s / cap)

    def softmax(*terms):
        """Of ``(scores, pairs, mask)``."""
        total, out = 0.0, 0.0
        wide = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        for s, pairs, _ in terms:
            total += jnp.where(pairs[None, None], jnp.exp(s), 0).sum(-1, keepdims=True)
        for s, pairs, mask in terms:
            p = jnp.where(pairs[None, None], jnp.exp(s), 0) / total
            out += jnp.einsum("bhqk,bkhd->bqhd", p * (mask / (1 - RATE)), wide)
        return out

    s, capped = scores(), scores(2.0)
    match SEVERAL.index(spec):
        case 0:
            counted = (s, causal, at[(1,)]), (capped, full, at[(1, 1)])
            return (softmax((s, causal, at[(0,)])) + softmax(*counted)) / 2
        case 1:
            parts = softmax((s, causal, at[(0,)])), softmax((s, full, at[(1,)]))
            return sum(gates[None, ..., i, None] * p for i, p in enumerate(parts))
        case _:
            parts = softmax((s, causal, at[(0, 0)])), softmax((s, full, at[(0, 1)]))
            # A head counts from the first of its part.
            second = softmax((s, causal, np.roll(at[(1,)], 2, axis=1)))
            first = sum(parts)[:, :, :2] / 2
            return jnp.concatenate([first, second[:, :, 2:]], 2)


def test_transforms_and_new_keys():
    q, k, v, do = arrays(2, 26, 26, 2, 2, 8, 8)
    traces = []

    @jax.jit
    def slope(q, key):
        traces.append(1)

        def loss(q):
            out = sa.attention(
                q, k, v, "causal()", dropout_rate=RATE, dropout_key=key, impl="xla"
            )
            return jnp.vdot(out, do)

        return jax.grad(loss)(q), jax.grad(jax.checkpoint(loss))(q)

    plain, again = slope(q, KEY)
    np.testing.assert_allclose(again, plain, atol=1e-5)
    other, _ = slope(q, jax.random.key(6))
    assert not np.allclose(plain, other)
    assert len(traces) == 1
    # Two keys at once are those keys one by one.
    both, _ = jax.vmap(slope, (None, 0))(q, jnp.stack([KEY, jax.random.key(6)]))
    np.testing.assert_allclose(both[0], plain, atol=1e-5)
    np.testing.assert_allclose(both[1], other, atol=1e-5)


def test_nothing_is_dropped_at_rate_zero():
    q, k, v, _ = arrays(1, 13, 13, 2, 2, 8, 8)
    call = lambda **options: sa.attention(q, k, v, "causal()", impl="xla", **options)
    np.testing.assert_array_equal(call(dropout_rate=0.0, dropout_key=KEY), call())


def test_what_does_not_fit_is_refused():
    q, k, v, _ = arrays(1, 13, 13, 2, 2, 8, 8)

    def refused(error, text, spec="causal()", operands=None, **options):
        with pytest.raises(error, match=text):
            sa.attention(q, k, v, spec, operands=operands, **options)

    for rate in (1.0, -0.1):
        refused(ValueError, "must be at least 0", dropout_rate=rate, dropout_key=KEY)
    refused(ValueError, "without dropout_key", dropout_rate=0.1)
    several = jax.random.split(KEY)
    refused(ValueError, "pass one key", dropout_rate=0.1, dropout_key=several)
    refused(ValueError, "pass one key", dropout_rate=0.1, dropout_key=jnp.zeros(2))
    centroids = {"centroids": jnp.ones((2, 3, 8))}
    clusters = sa.scatter_mean(sa.selections.kmeans(3))
    for spec in (sa.average(sa.causal()), sa.heads((sa.causal(), 2))):
        refused(ValueError, "pass one key", spec, dropout_rate=0.1, dropout_key=several)
    refused(NotImplementedError, "is not implemented", clusters, centroids, **CALL)


@pytest.mark.sample(1)
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_it_lowers_for_chips(target):
    """All three kernels are lowered, for a TPU as far as machine code."""
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    impl = "tpu" if target.startswith("tpu") else "triton"

    def slope(q, k, v):
        call = lambda *x: sa.attention(*x, "causal() & window(99)", impl=impl, **CALL)
        return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2))(
            q, k, v
        )

    if impl == "tpu":
        text = compiling.compile_for(slope, (shape,) * 3, target).as_text()
        names = {f"sadsl_{kernel}" for kernel in ("forward", "dq", "dkv")}
        assert set(re.findall(r"%(sadsl_\w+)\.\d+ =", text)) == names
        assert text.count("tpu_custom_call") == 3
    else:
        text = compiling.lower_for(slope, (shape,) * 3, target).as_text()
        assert text.count("@__gpu$xla.gpu.triton(") == 3


@pytest.mark.parametrize("impl", ["xla", "triton"])
def test_it_goes_with_a_learned_bias(impl):
    q, k, v, do = arrays(1, 26, 26, 2, 2, 8, 8)
    table = jnp.sin(jnp.arange(52, dtype=jnp.float32)).reshape(2, 26)
    spec = sa.softmax(sa.causal(), bias=distance_bias("table", 25))

    def slopes(impl):
        options = CALL | BACKENDS[impl]

        def loss(q, table):
            given = {"table": table}
            out = sa.attention(q, k, v, spec, operands=given, impl=impl, **options)
            return jnp.vdot(out, do)

        return jax.jit(jax.grad(loss, (0, 1)))(q, table)

    for a, b in zip(slopes(impl), slopes("reference"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
