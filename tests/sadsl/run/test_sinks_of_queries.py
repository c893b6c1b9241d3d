"""A sink for each query and head, in softmax and joint, against float64."""

import itertools

import calls
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

HEADS, KV_HEADS, DIM = 4, 2, 8
# Queries 2 to 4 see no key: their normaliser is the sink alone.
NEAR = (sa.causal() & sa.window(9)) - sa.queries(2, 5)
FIRST = (sa.causal() & sa.sinks(3)) - sa.queries(2, 5)
SPECS = {
    "softmax": (sa.softmax(NEAR, sink="s"), NEAR),
    # Two kernels: the parts are scored alike, but only one has a bias, of 0.
    "joint": (
        sa.joint(
            sa.softmax(NEAR, sink="s"),
            sa.softmax(FIRST, bias=sa.bias(lambda q, k: 0.0 * (q - k)), sink="s"),
        ),
        NEAR | FIRST,
    ),
}


def made(n, batch_of_sinks):
    rng = np.random.default_rng(n)
    q, k, v, do = calls.arrays(2, n, n, HEADS, KV_HEADS, DIM, DIM, seed=n)
    sinks = jnp.asarray(rng.normal(size=(batch_of_sinks, n, HEADS)) * 2, jnp.float32)
    dlse = jnp.asarray(rng.normal(size=(2, HEADS, n)), jnp.float32)
    return (q, k, v, sinks), (do, dlse)


def by_definition(pairs, values, cotangents):
    """Output, lse and gradients of the definition, in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*values, *cotangents)]
        *values, do, dlse = wide

        def attend(q, k, v, sinks):
            k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
            e = jnp.where(pairs, jnp.exp(s), 0.0)
            total = e.sum(axis=-1) + jnp.exp(jnp.swapaxes(sinks, 1, 2))
            out = jnp.einsum("bhqk,bkhd->bqhd", e / total[..., None], v)
            return out, jnp.log(total)

        out, pull = jax.vjp(attend, *values)
        return jax.tree.map(np.asarray, (*out, *pull((do, dlse))))


CASES = [(*c, n) for c in itertools.product(SPECS, calls.IMPLS) for n in (1, 13, 130)]


# In the fast suite, a layer of Inkling-2 has them (tests/sadsl/catalog).
@pytest.mark.slow
@pytest.mark.parametrize(("name", "impl", "n"), CASES)
def test_values_and_gradients(name, impl, n):
    spec, pairs = SPECS[name]
    values, cotangents = made(n, batch_of_sinks=1 if name == "joint" else 2)

    @jax.jit
    def run(values, cotangents):
        def call(q, k, v, sinks):
            return sa.attention(
                q, k, v, spec, operands={"s": sinks}, impl=impl, return_lse=True,
                **calls.BACKENDS[impl],
            )  # fmt: skip

        out, pull = jax.vjp(call, *values)
        return *out, *pull(cotangents)

    found = run(values, cotangents)
    wanted = by_definition(pairs.dense(n)[None], values, cotangents)
    for what, a, b in zip(
        ["o", "lse", "q", "k", "v", "sinks"], found, wanted, strict=True
    ):
        oracle.assert_close(a, b, "float32", f"{name} {impl} {n} {what}")


@pytest.mark.slow
def test_one_number_for_all_queries_is_the_sink_of_a_head():
    (q, k, v, sinks), _ = made(13, 2)
    spec = sa.softmax(NEAR, sink=True)
    of_head = sinks[:, 0]
    of_query = jnp.broadcast_to(of_head[:, None], sinks.shape)
    found, wanted = (
        sa.attention(q, k, v, spec, operands={"sink": x}) for x in (of_query, of_head)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_queries_of_a_later_call_bring_their_own_sinks():
    """With an offset, the sinks are those of the queries that are passed."""
    (q, k, v, sinks), _ = made(13, 2)
    spec = sa.softmax(NEAR, sink=True)
    whole = sa.attention(q, k, v, spec, operands={"sink": sinks})
    last = sa.attention(
        q[:, 9:], k, v, spec, operands={"sink": sinks[:, 9:]}, q_offset=9
    )
    np.testing.assert_allclose(last, whole[:, 9:], atol=1e-6)


def test_lower_takes_them():
    q = jax.ShapeDtypeStruct((2, 64, HEADS, 16), jnp.float32)
    k = jax.ShapeDtypeStruct((2, 64, KV_HEADS, 16), jnp.float32)
    sinks = jax.ShapeDtypeStruct((1, 64, HEADS), jnp.float32)
    spec = sa.softmax(NEAR, sink=True)
    low = sa.lower(spec, q, k, k, target="cpu", operands={"sink": sinks})
    assert "f32[1,64,4]" in low.jaxpr


@pytest.mark.parametrize("shape", [(13, 4), (2, 12, 4), (3, 13, 4), (2, 4, 13), (3,)])
def test_sinks_of_another_shape_are_refused(shape):
    """Two axes are those of batch and heads, never those of queries."""
    (q, k, v, _), _ = made(13, 2)
    message = r"operand 'sink' has shape .*\(4,\), .*\(2, 4\), or \(2, 13, 4\) with one"
    for spec in (
        sa.softmax(NEAR, sink=True),
        sa.joint(sa.softmax(NEAR, sink=True), sa.softmax(FIRST, 2.0, sink=True)),
    ):
        with pytest.raises(ValueError, match=message):
            sa.attention(q, k, v, spec, operands={"sink": jnp.zeros(shape)})
