"""Biases by distance that queries weigh, and running gates, against float64."""

import calls
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from lowering.run_time.running_sums import running_sums

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

HEADS, KV_HEADS, DIM, OFFSET = 4, 2, 8, 5
FACTOR = sa.bias(lambda q, k, h: 0.5 + 0.25 * sa.log(q + 1))


def sizes_of(q_len, kv_len, offset):
    q, k = np.arange(q_len)[:, None] + offset, np.arange(kv_len)[None]
    return q, k, q - k


def by_distance(x, table, distance, extent, factor):
    """``[batch, heads, q, k]``."""
    rows = jnp.einsum("bqhc,ce->bhqe", x, table)
    at = np.broadcast_to(np.clip(distance, 0, extent - 1), (1, 1, *distance.shape))
    rows = jnp.broadcast_to(rows, (x.shape[0], *rows.shape[1:]))
    at = np.broadcast_to(at, (*rows.shape[:2], *distance.shape))
    found = jnp.take_along_axis(rows, jnp.asarray(at), axis=-1)
    return jnp.where((distance >= 0) & (distance < extent), found, 0.0) * factor


def attended(q, k, v, pairs, bias, sinks=None):
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias
    s = jnp.where(pairs, s, -1e4)
    extra = jnp.full(s.shape[:-1], -1e4) if sinks is None else sinks
    extra = jnp.broadcast_to(extra, s.shape[:-1])
    top = jax.lax.stop_gradient(jnp.maximum(s.max(axis=-1), extra))
    e = jnp.where(pairs, jnp.exp(s - top[..., None]), 0.0)
    total = e.sum(axis=-1) + jnp.exp(extra - top)
    return jnp.einsum("bhqk,bkhd->bqhd", e / total[..., None], v)


def compared(found, wanted, values, names, *, dtype="float32"):
    """Asserts equal outputs and gradients of ``sum(out * cos(i))``."""

    def gradient(run, *values):
        def total(*values):
            out = run(*values)
            at = jnp.arange(out.size, dtype=out.dtype).reshape(out.shape)
            return jnp.sum(out * jnp.cos(at)), out

        every = tuple(range(len(values)))
        gradients, out = jax.grad(total, every, has_aux=True)(*values)
        return out, *gradients

    ours = jax.jit(lambda *x: gradient(found, *x))(*values)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in values]
        right = jax.jit(lambda *x: gradient(wanted, *x))(*wide)
        right = [np.asarray(x) for x in right]
    for name, a, b in zip(("out", *names), ours, right, strict=True):
        oracle.assert_close(a, b, dtype, name)


# --- by distance ---


# In the fast suite, a layer of Inkling-2 has such a bias (tests/sadsl/catalog).
@pytest.mark.slow
@pytest.mark.parametrize("impl", calls.IMPLS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "extent", "shared"),
    [(1, 6, 9, True), (13, 18, 4, False), (37, 42, 64, True), (130, 135, 1, False)],
)
def test_distances_weighed_by_queries(impl, q_len, kv_len, extent, shared):
    """Both sides of the query, an offset, a factor; heads of their own, or shared."""
    channels, rng = 3, np.random.default_rng(extent)
    q, k, v, _ = calls.arrays(2, q_len, kv_len, HEADS, KV_HEADS, DIM, DIM)
    lead = (1, q_len, 1) if shared else (2, q_len, HEADS)
    x = jnp.asarray(rng.normal(size=(*lead, channels)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(channels, extent)), jnp.float32)
    spec = sa.softmax(
        sa.full(), bias=sa.query_distance_bias("x", "t", channels, extent, FACTOR)
    )
    position, _, distance = sizes_of(q_len, kv_len, OFFSET)
    factor = 0.5 + 0.25 * np.log(position + 1)

    def found(q, k, v, x, table):
        return sa.attention(
            q, k, v, spec, operands={"x": x, "t": table}, q_offset=OFFSET, impl=impl,
            **calls.BACKENDS[impl],
        )  # fmt: skip

    def wanted(q, k, v, x, table):
        bias = by_distance(x, table, distance, extent, factor)
        return attended(q, k, v, np.full(distance.shape, True), bias)

    compared(found, wanted, (q, k, v, x, table), ("q", "k", "v", "x", "t"))


def test_no_array_of_all_pairs_is_made():
    """Vectors of queries and diagonals: their number grows with the length."""
    n, channels = 512, 4
    x = jax.ShapeDtypeStruct((1, n, HEADS, 16), jnp.float32)
    k = jax.ShapeDtypeStruct((1, n, KV_HEADS, 16), jnp.float32)
    given = {
        "x": jax.ShapeDtypeStruct((1, n, HEADS, channels), jnp.float32),
        "t": jax.ShapeDtypeStruct((channels, 64), jnp.float32),
    }
    spec = sa.softmax(
        sa.causal(), bias=sa.query_distance_bias("x", "t", channels, 64, FACTOR)
    )
    low = sa.lower(spec, x, k, k, target="cpu", operands=given)
    layouts = low.options.lowered_score.outside
    # With a factor of two summands too, each channel has one vector and one diagonal.
    assert [len(x) for x in layouts] == [channels, 0, channels, 0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "tpu-v5e"])
def test_lowering_for_chips(target):
    n = 512
    q = jax.ShapeDtypeStruct((1, n, HEADS, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, n, KV_HEADS, 64), jnp.bfloat16)
    given = {
        "x": jax.ShapeDtypeStruct((1, n, HEADS, 16), jnp.float32),
        "t": jax.ShapeDtypeStruct((16, 128), jnp.float32),
        "g": jax.ShapeDtypeStruct((1, n, HEADS), jnp.float32),
    }
    bias = sa.query_distance_bias("x", "t", 16, 128) + sa.gate_bias("g")
    spec = sa.softmax(sa.causal() & sa.window(127), bias=bias)
    low = sa.lower(spec, q, k, k, target=target, operands=given, gradient=True)
    assert "tt.func" in low.module or "tpu_custom_call" in low.module


@pytest.mark.slow
def test_compiling_for_a_tpu():
    q = jax.ShapeDtypeStruct((1, 512, HEADS, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 512, KV_HEADS, 64), jnp.bfloat16)
    given = {
        "x": jax.ShapeDtypeStruct((1, 512, HEADS, 16), jnp.float32),
        "t": jax.ShapeDtypeStruct((16, 128), jnp.float32),
        "g": jax.ShapeDtypeStruct((1, 512, HEADS), jnp.float32),
    }
    bias = sa.query_distance_bias("x", "t", 16, 128) + sa.gate_bias("g")
    spec = sa.softmax(sa.causal() & sa.window(127), bias=bias)
    # Tiles of 512 keys and 16 channels do not fit the memory of the kernel.
    small = sa.KernelConfig(block_q=128, block_kv=128)
    low = sa.lower(
        spec, q, k, k, target="tpu-v5e", operands=given, gradient=True, config=small
    )
    assert low.compile().memory()["code"] > 0


# --- running gates ---


def test_running_sums_keep_their_digits():
    """The difference of two sums is exact to what their difference needs."""
    n = 4096
    rng = np.random.default_rng(0)
    gates = jnp.asarray(-rng.exponential(size=(1, n, 2)) * 3, jnp.float32)
    right = np.cumsum(np.asarray(gates, np.float64), axis=1)
    assert np.abs(right).max() > 1e4
    whole, rest = (np.asarray(x) for x in jax.jit(running_sums)(gates))
    np.testing.assert_array_equal(whole, np.round(whole))
    assert np.abs(rest).max() <= 0.5
    near = slice(64, None), slice(None, -64)
    exact = right[:, near[0]] - right[:, near[1]]
    ours = whole[:, near[0]] - whole[:, near[1]] + (rest[:, near[0]] - rest[:, near[1]])
    plain = np.asarray(jnp.cumsum(gates, axis=1))
    plain = plain[:, near[0]] - plain[:, near[1]]
    assert np.abs(ours - exact).max() < 2e-5  # differences of 200 have ulps of 1.5e-5
    assert np.abs(plain - exact).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_forgetting_at_length(impl):
    """float32 suffices where float32 running sums lose their digits."""
    n = 4096
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, n, h, DIM)), jnp.float32) for h in (1, 1, 1)
    )
    gates = jnp.asarray(-rng.exponential(size=(1, n, 1)) * 8, jnp.float32)
    near = sa.causal() & sa.window(15)
    exact = sa.softmax(near, bias=sa.gate_bias("g"))
    lossy = sa.softmax(near, bias=sa.key_bias("c"))

    def run(gates):
        return sa.attention(q, k, v, exact, operands={"g": gates}, impl=impl)

    found = jax.jit(run)(gates)
    sums = -jnp.cumsum(gates, axis=1)
    other = sa.attention(q, k, v, lossy, operands={"c": sums[:, :, 0]}, impl=impl)
    wide = np.asarray(gates, np.float64)[0, :, 0].cumsum()
    right = np.zeros((n, DIM))
    a, b, c = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    for i in range(n):
        at = slice(max(0, i - 15), i + 1)
        s = b[at] @ a[i] * DIM**-0.5 + wide[i] - wide[at]
        p = np.exp(s - s.max())
        right[i] = p @ c[at] / p.sum()
    ours = np.abs(np.asarray(found)[0, :, 0] - right).max()
    plain = np.abs(np.asarray(other)[0, :, 0] - right).max()
    assert ours < 3e-6
    assert plain > 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("impl", calls.IMPLS)
@pytest.mark.parametrize("n", [13, 130])
def test_gates_and_a_sink(impl, n):
    """Values and gradients; another bias beside the gates, a shared head, an offset."""
    rng, kv_len = np.random.default_rng(n), n + OFFSET
    q, k, v, _ = calls.arrays(2, n, kv_len, HEADS, KV_HEADS, DIM, DIM)
    gates = -rng.exponential(size=(2, kv_len, 1 if n == 13 else HEADS))
    gates = jnp.asarray(gates, jnp.float32)
    sinks = jnp.asarray(rng.normal(size=(1, n, HEADS)), jnp.float32)
    spec = sa.softmax(sa.causal(), bias=sa.alibi() + sa.gate_bias("g"), sink=True)
    assert sa.parse(repr(spec)) == spec
    _, _, distance = sizes_of(n, kv_len, OFFSET)
    slopes = np.array([2.0 ** (-2 * (h + 1)) for h in range(HEADS)])

    def found(q, k, v, gates, sinks):
        return sa.attention(
            q, k, v, spec, operands={"g": gates, "sink": sinks}, q_offset=OFFSET,
            impl=impl, **calls.BACKENDS[impl],
        )  # fmt: skip

    def wanted(q, k, v, gates, sinks):
        sums = jnp.swapaxes(jnp.cumsum(gates, axis=1), 1, 2)
        bias = sums[:, :, OFFSET:, None] - sums[:, :, None, :]
        bias = bias - slopes[:, None, None] * np.abs(distance)
        return attended(q, k, v, distance >= 0, bias, jnp.swapaxes(sinks, 1, 2))

    compared(found, wanted, (q, k, v, gates, sinks), ("q", "k", "v", "g", "sink"))


@pytest.mark.slow
def test_a_traced_offset_moves_the_gates_of_queries():
    q, k, v, _ = calls.arrays(1, 3, 12, HEADS, KV_HEADS, DIM, DIM)
    gates = jnp.asarray(-np.random.default_rng(2).exponential(size=(12, 4)), "float32")
    spec = sa.softmax(sa.causal(), bias=sa.gate_bias("g"), sink=True)
    given = {"g": gates, "sink": jnp.zeros(4)}

    def run(at):
        return sa.attention(q, k, v, spec, operands=given, q_offset=at)

    np.testing.assert_allclose(jax.jit(run)(jnp.int32(7)), run(7), atol=2e-6)


# --- what is refused ---


def call_with(bias, n=10, kv_len=12, **shapes):
    q, k, v, _ = calls.arrays(1, n, kv_len, HEADS, KV_HEADS, DIM, DIM)
    given = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return sa.attention(q, k, v, sa.softmax(sa.full(), bias=bias), operands=given)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (1, 10, 4, 3)}, r"reads `weights\('t'\).*'t' was not given"),
        ({"x": (10, 4, 2), "t": (3, 5)}, "4 or 1, 3 entries"),
        ({"x": (9, 4, 3), "t": (3, 5)}, "must have 10, 4 or 1"),
        ({"x": (10, 4, 3), "t": (3, 4)}, "5 entries"),
        ({"x": (10, 4, 3), "t": (3, 5), "z": (3,)}, "operand 'z'"),
    ],
)
def test_arrays_of_another_shape(shapes, message):
    with pytest.raises(ValueError, match=message):
        call_with(sa.query_distance_bias("x", "t", 3, 5), **shapes)


def test_gates_that_do_not_reach_a_query():
    with pytest.raises(ValueError, match="13, 4 or 1 entries"):
        call_with(sa.gate_bias("g"), n=13, kv_len=12, g=(12, 4))
    with pytest.raises(ValueError, match="'g' was not given"):
        call_with(sa.gate_bias("g"))


def test_numbers_and_names():
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        sa.query_distance_bias("x", "t", 0, 5)
    with pytest.raises(ValueError, match="extent=0 must be at least 1"):
        sa.query_distance_bias("x", "t", 3, 0)
    with pytest.raises(ValueError, match="reads the key"):
        sa.query_distance_bias("x", "t", 3, 5, sa.alibi())
    with pytest.raises(TypeError, match=r"factor=2\.0 must be made by bias"):
        sa.query_distance_bias("x", "t", 3, 5, 2.0)
    with pytest.raises(ValueError, match="identifier"):
        sa.gate_bias("not a name")
