"""Dropout in the kernels: which weights are dropped, values and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from kernel_cases import Case, Pattern

from pallas_kernels import dense, dispatch, dropout
from pallas_kernels.call import Outputs, Seeds
from pallas_kernels.config import Tile

# Compiled without optimisations: no test here measures speed.
pytestmark = pytest.mark.usefixtures("quick")

RATE = 0.3
CASES = [
    # Every tile partial, an integer vector, and a group of query heads.
    Case(
        pattern=Pattern("segments", segments=True),
        q_len=45, kv_len=61, q_heads=4, kv_heads=2, soft_cap=3.0,
        forward=Tile(block_q=16, block_kv=32), dkv=Tile(block_q=32, block_kv=16),
    ),
    # Full tiles too, empty rows and keys, and other block sizes.
    Case(
        pattern=Pattern("holes"), q_len=130, kv_len=77, q_heads=1, kv_heads=1,
        forward=Tile(block_q=32, block_kv=16), dkv=Tile(block_q=16, block_kv=16),
    ),
]  # fmt: skip


def hashed(x):
    """The hash on Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def seeds(words, q, kv, batch, heads):
    """Seeds of the queries ``[batch, heads, q]`` and of the keys ``[1, 1, kv]``."""
    words = jnp.asarray(np.array(words, np.uint32).view(np.int32))
    at = lambda n: jnp.arange(n, dtype=jnp.int32)[None, None]
    return dropout.query_seeds(words, at(q), batch, heads), dropout.key_seeds(at(kv))


def kept(words, q, kv, batch=1, heads=1, rate=RATE):
    queries, keys = seeds(words, q, kv, batch, heads)
    return np.asarray(dropout.factor(queries[..., None], keys[..., None, :], rate)) > 0


def test_the_hash_is_that_of_integers_modulo_two_to_the_32():
    values = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 123456789], np.uint32)
    found = np.asarray(dropout.mix(jnp.asarray(values.view(np.int32)))).view(np.uint32)
    assert found.tolist() == [hashed(int(x)) for x in values]
    queries, keys = (np.asarray(x).reshape(-1) for x in seeds((7, 9), 9, 7, 1, 1))
    pairs = queries[:, None].view(np.uint32) ^ keys[None].view(np.uint32)
    # A signed number minus the smallest one is the unsigned number minus zero.
    large = [[(hashed(int(x)) ^ 2**31) / 2**32 >= RATE for x in row] for row in pairs]
    np.testing.assert_array_equal(kept((7, 9), 9, 7)[0, 0], large)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_as_many_are_dropped_as_asked(rate):
    """In total, per query and per key, within statistical error."""
    n = 512
    drops = ~kept((1, 2), n, n, 2, 2, rate)
    deviation = np.sqrt(rate * (1 - rate))
    for axes, count in ((None, drops.size), (2, n), (3, n), ((2, 3), n * n)):
        off = (drops.mean(axis=axes) - rate) * np.sqrt(count) / deviation
        assert np.abs(off).max() < 5
        assert off.size < 100 or abs(np.std(off) - 1) < 0.1


def test_no_two_rows_columns_heads_entries_or_keys_are_alike():
    n = 256
    one = kept((1, 2), n, n, 2, 3, 0.5).astype(float) - 0.5
    several = [
        one,
        kept((1, 3), n, n, 2, 3, 0.5) - 0.5,
        kept((2, 2), n, n, 2, 3, 0.5) - 0.5,
    ]
    flat = np.concatenate([x.reshape(-1, n * n) for x in several])
    between = flat @ flat.T * 4 / n - n * np.eye(len(flat))
    assert np.abs(between).max() < 5
    for x in (one[0, 0], one[0, 0].T):
        correlation = x @ x.T * 4 / np.sqrt(n) - np.sqrt(n) * np.eye(n)
        assert np.abs(correlation).max() < 6
        assert abs(np.std(correlation) - 1) < 0.1
    # Neighbours along both axes and along diagonals.
    x = one[0, 0]
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[1:, 1:], x[:-1, :-1])):
        assert abs((a * b).sum() * 4 / np.sqrt(a.size)) < 4


def test_a_rate_next_to_one_keeps_next_to_nothing():
    assert not kept((1, 2), 64, 64, rate=1 - 2.0**-40).any()


def plain(case, factor):
    pairs = jnp.asarray(case.pairs())
    group = case.q_heads // case.kv_heads

    def f(q, k, v):
        k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * case.dim**-0.5
        if case.soft_cap is not None:
            s = case.soft_cap * jnp.tanh(s / case.soft_cap)
        row = pairs.any(axis=-1)
        s = jnp.where(pairs, s, jnp.where(row[..., None], -jnp.inf, 0.0))
        lse = jax.nn.logsumexp(s, axis=-1)
        p = jnp.where(pairs, jnp.exp(s - lse[..., None]), 0.0) * factor
        return Outputs(
            jnp.einsum("bhqk,bhkd->bhqd", p, v), jnp.where(row, lse, -jnp.inf)
        )

    return f


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton"])
def test_values_and_gradients(impl, case):
    inputs, do, dlse = case.arrays()
    words = jnp.array([5, -6], jnp.int32)
    at = lambda n: jnp.arange(n, dtype=jnp.int32)[None, None]
    queries = dropout.query_seeds(words, at(case.q_len), case.batch, case.q_heads)
    keys = dropout.key_seeds(at(case.kv_len))
    vectors = case.vectors()._replace(seeds=Seeds(queries, keys))
    options = {} if impl == "xla" else {"interpret": True}
    call, masks = replace(case.call(**options), dropout_rate=RATE), case.masks()

    @jax.jit
    def run(inputs, vectors):
        f = lambda x: dispatch.attend(x, vectors, masks, call, impl=impl)
        out, pull = jax.vjp(f, inputs)
        return (*out, *pull(Outputs(do, dlse))[0])

    found = run(inputs, vectors)
    keep = dropout.factor(queries[..., None], keys[..., None, :], RATE) > 0
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*inputs, do, dlse)]
        factor = jnp.asarray(np.asarray(keep, np.float64) / (1 - RATE))
        out, pull = jax.vjp(plain(case, factor), *wide[:3])
        expected = (*out, *pull(Outputs(*wide[3:])))
    for name, a, b in zip(oracle.Result._fields, found, expected, strict=True):
        oracle.assert_close(a, np.asarray(b), "float32", f"{impl} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton"])
def test_gradient_of_keys_is_that_of_the_dense_pass(impl):
    """``dk`` under dropout equals that of ``pallas_kernels.dense``."""
    case = CASES[0]
    inputs, do, dlse = case.arrays()
    queries, keys = seeds((3, 4), case.q_len, case.kv_len, case.batch, case.q_heads)
    vectors = case.vectors()._replace(seeds=Seeds(queries, keys))
    options = {} if impl == "xla" else {"interpret": True}
    call, masks = replace(case.call(**options), dropout_rate=RATE), case.masks()
    without = replace(call, dropout_rate=0.0)

    def attend(k, call):
        return dispatch.attend(inputs._replace(k=k), vectors, masks, call, impl=impl)

    def reference(k, call):
        tests = masks.forward.test_of_head
        return dense.forward(inputs._replace(k=k), vectors, tests, call)

    @jax.jit
    def gradients(k):
        cotangent = Outputs(do, dlse)
        found = jax.vjp(lambda k: attend(k, call), k)[1](cotangent)[0]
        expected, other = (
            jax.vjp(lambda k, c=c: reference(k, c), k)[1](cotangent)[0]
            for c in (call, without)
        )
        return found, expected, other

    found, expected, other = gradients(inputs.k)
    oracle.assert_close(found, np.asarray(expected, np.float64), "float32", impl)
    assert np.abs(np.asarray(expected - other)).max() > 0.1


@pytest.mark.slow
def test_second_order():
    """Both modes mixed, with the same weights dropped."""
    case = CASES[0]
    x, do, dlse = case.arrays()
    queries, keys = seeds((5, 6), case.q_len, case.kv_len, case.batch, case.q_heads)
    vectors = case.vectors()._replace(seeds=Seeds(queries, keys))
    call, masks = replace(case.call(), dropout_rate=RATE), case.masks()
    keep = dropout.factor(queries[..., None], keys[..., None, :], RATE) > 0

    def derivatives(f, x, u, c):
        gradient = lambda x: jax.vjp(f, x)[1](Outputs(*c))[0]
        return jax.jvp(f, (x,), (u,))[1], jax.jvp(gradient, (x,), (u,))[1]

    f = lambda x: dispatch.attend(x, vectors, masks, call, impl="xla")
    u = jax.tree.map(lambda x: jnp.sin(3 * x), x)
    found = jax.jit(lambda x, u, c: derivatives(f, x, u, c))(x, u, (do, dlse))
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)), (x, u, (do, dlse))
        )
        g = plain(case, jnp.asarray(np.asarray(keep, np.float64) / (1 - RATE)))
        expected = derivatives(lambda x: g(*x), *wide)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        oracle.assert_close(a, np.asarray(b), "float32")
