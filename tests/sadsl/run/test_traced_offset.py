"""A ``q_offset`` that is an array equals the same integer, on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa

BATCH, QUERIES, KEYS, HEADS = 2, 3, 37, 2
SPECS = {
    "causal": sa.causal(),
    "window and sinks": sa.causal() & (sa.window(5) | sa.sinks(2)),
    "no position": sa.full(),
    "strided": sa.causal() & sa.strided(3),
    "heads": sa.heads((sa.causal(), 1), (sa.causal() & sa.window(4), 1)),
    "joint": sa.joint(sa.causal() & sa.window(4), sa.causal() & sa.blocks(8)),
    "bias": sa.softmax(sa.causal(), bias=sa.alibi()),
    "scale": sa.softmax(
        sa.causal(), scale=sa.bias(lambda q, k, h: 1 + 0.1 * sa.log(1 + q))
    ),
}


def arrays():
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, HEADS, 8) for n in (QUERIES, KEYS, KEYS)]
    return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


def gradients(call):
    return jax.jit(jax.grad(lambda q, k, v: jnp.sum(call(q, k, v) ** 2), (0, 1, 2)))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("scale", "no position")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in SPECS
    ],
)
def test_an_array_is_the_same_as_an_integer(name):
    q, k, v = arrays()
    run = jax.jit(lambda at: sa.attention(q, k, v, SPECS[name], q_offset=at))
    for at in (0, KEYS - QUERIES):
        expected = sa.attention(q, k, v, SPECS[name], q_offset=at)
        each = jnp.full((BATCH,), at, jnp.int32)
        for given in (jnp.int32(at), each):
            np.testing.assert_allclose(run(given), expected, atol=1e-6)


@pytest.mark.parametrize("lists", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_choices_of_each_query_follow_a_position(lists):
    """Also beyond the keys, where a window of eligible keys is partly gone."""
    q, k, v = arrays()
    near = sa.causal() & sa.window(12)
    spec = near & sa.topk(3, block=2, block_q=1, eligible=near)
    options = {"config": sa.KernelConfig(lists=lists)}
    run = jax.jit(lambda at: sa.attention(q, k, v, spec, q_offset=at, **options))
    for at in (0, 9, KEYS - QUERIES, KEYS + 4):
        expected = sa.attention(q, k, v, spec, q_offset=at, **options)
        np.testing.assert_allclose(run(jnp.int32(at)), expected, atol=1e-6)
    each = run(jnp.array([9, KEYS + 4]))
    alone = [sa.attention(q, k, v, spec, q_offset=x)[i] for i, x in enumerate((9, 41))]
    np.testing.assert_allclose(each, jnp.stack(alone), atol=1e-6)


def test_each_batch_entry_has_its_own_position():
    q, k, v = arrays()
    spec = SPECS["window and sinks"]
    found = sa.attention(q, k, v, spec, q_offset=jnp.array([5, 20]))
    for i, at in enumerate((5, 20)):
        alone = (x[i : i + 1] for x in (q, k, v))
        expected = sa.attention(*alone, spec, q_offset=at)
        np.testing.assert_allclose(found[i : i + 1], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "tpu", "triton"])
def test_backends_and_gradients(impl):
    q, k, v = arrays()
    spec, at = SPECS["window and sinks"], jnp.array([5, 20])
    options = {"interpret": impl != "reference", "impl": impl}

    def call(*x):
        return sa.attention(*x, spec, q_offset=at, **options)

    def expected(*x):
        return sa.attention(*x, spec, q_offset=at, impl="xla")

    np.testing.assert_allclose(call(q, k, v), expected(q, k, v), atol=1e-5)
    pairs = zip(gradients(call)(q, k, v), gradients(expected)(q, k, v), strict=True)
    for found, right in pairs:
        np.testing.assert_allclose(found, right, atol=1e-4)


def test_what_is_refused():
    q, k, v = arrays()
    at = jnp.int32(3)

    def refused(error, match, spec=SPECS["causal"], q_offset=at, **options):
        with pytest.raises(error, match=match):
            sa.attention(q, k, v, spec, q_offset=q_offset, **options)

    chosen = sa.causal() & sa.topk(1, block=8)
    refused(NotImplementedError, "topk.*does not choose for each query.*select", chosen)
    refused(NotImplementedError, "q_offset is an array: linear", sa.linear())
    refused(ValueError, r"shape \(3,\).*2 batch entries", q_offset=jnp.arange(3))
    refused(ValueError, r"\[ 3 -1\] must be at least 0", q_offset=jnp.array([3, -1]))
    refused(TypeError, "float32.*integers", q_offset=jnp.float32(1))
    refused(TypeError, "q_offset='3' must be an integer", q_offset="3")
    refused(ValueError, "operands has 'q_offset'", operands={"q_offset": at})
    random = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    refused(NotImplementedError, "dropout follows from positions", **random)
