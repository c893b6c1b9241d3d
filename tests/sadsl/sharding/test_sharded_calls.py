"""Options of sharded calls, layouts of their arrays, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sadsl as sa

C = sa.causal()
NEAR = C & (sa.window(9) | sa.sinks(2))
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(kind=AUTO, **sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )


def arrays(n=61, heads=4, kv_heads=4, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((batch, n, h, 8) for h in (heads, kv_heads, kv_heads))
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def gradients(call, inputs):
    return jax.jit(jax.grad(lambda *x: jnp.sin(call(*x)).sum(), (0, 1, 2)))(*inputs)


def assert_equal(found, wanted, atol=3e-5):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=atol)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.usefixtures("quick")
def test_fewer_key_heads_than_devices(kv_heads):
    mesh = mesh_of(h=4, s=2)
    inputs = arrays(40, kv_heads=kv_heads)

    def call(q, k, v):
        where = {"mesh": mesh, "heads": "h", "sequence": "s"}
        return sa.sharded_attention(q, k, v, NEAR, **where)

    whole = lambda q, k, v: sa.attention(q, k, v, NEAR)
    assert_equal([call(*inputs)], [whole(*inputs)])
    assert_equal(gradients(call, inputs), gradients(whole, inputs))


@pytest.mark.parametrize(
    "where",
    [{"sequence": "s"}, {"batch": "b", "heads": "h", "sequence": "s"}, {"heads": "h"}],
    ids=["sequence", "all", "heads"],
)
@pytest.mark.parametrize(
    "spec",
    [NEAR, C, sa.average(C & sa.window(4), C)],
    ids=["near", "causal", "average"],
)
@pytest.mark.sample(3)
@pytest.mark.usefixtures("quick")
def test_dropout_drops_the_same_weights(spec, where):
    mesh, key = mesh_of(b=2, h=2, s=2), jax.random.key(3)
    options = {"dropout_rate": 0.4, "dropout_key": key}
    inputs = arrays(50)
    call = lambda *x: sa.sharded_attention(*x, spec, mesh=mesh, **where, **options)
    whole = lambda *x: sa.attention(*x, spec, **options)
    assert_equal([call(*inputs)], [whole(*inputs)])
    assert_equal(gradients(call, inputs), gradients(whole, inputs))


@pytest.mark.usefixtures("quick")
def test_dropout_over_entries():
    """Each query drops the entries that it drops on one device."""
    entries = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 4, 8)))
    options = {"operands": {"e": entries.astype(jnp.float32)}, "impl": "reference"}
    options |= {"dropout_rate": 0.4, "dropout_key": jax.random.key(3)}
    spec = sa.over("e", sa.where(lambda q, k: k <= q // 6))
    where = {"mesh": mesh_of(b=2, s=4), "batch": "b", "sequence": "s"}
    found = sa.sharded_attention(*arrays(), spec, **where, **options)
    assert_equal([found], [sa.attention(*arrays(), spec, **options)])


@pytest.mark.parametrize(("queries", "keys"), [(50, 77), (77, 50), (13, 130)])
def test_more_or_fewer_keys_than_queries(queries, keys):
    q, (_, k, v) = arrays(queries)[0], arrays(keys)
    spec = sa.where(lambda q, k: abs(q - k) <= 9)
    options = {"impl": "reference", "return_lse": True}
    where = {"mesh": mesh_of(s=4), "sequence": "s"}
    found = sa.sharded_attention(q, k, v, spec, **where, **options)
    assert_equal(found, sa.attention(q, k, v, spec, **options))


@pytest.mark.usefixtures("quick")
def test_the_lse_and_a_traced_scale():
    mesh, inputs = mesh_of(s=8), arrays()
    options = {"return_lse": True, "impl": "reference"}

    @jax.jit
    def call(scale, *x):
        where = {"mesh": mesh, "sequence": "s", "sm_scale": scale}
        return sa.sharded_attention(*x, NEAR, **where, **options)

    wanted = sa.attention(*inputs, NEAR, sm_scale=0.7, **options)
    assert_equal(call(0.7, *inputs), wanted)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("n", [64, 61])
@pytest.mark.usefixtures("quick")
def test_arrays_that_are_dealt_already(n, kind):
    mesh, inputs = mesh_of(kind, b=2, s=4), arrays(n, heads=2, kv_heads=2)
    place = NamedSharding(mesh, P("b", "s" if n == 64 else None))
    dealt = [jax.device_put(x, place) for x in inputs]
    call = lambda *x: sa.sharded_attention(
        *x, C & sa.window(9), mesh=mesh, batch="b", sequence="s"
    )
    found = jax.jit(call)(*dealt)
    assert_equal([found], [sa.attention(*inputs, C & sa.window(9))])
    if n == 64:
        assert found.sharding.is_equivalent_to(place, 4)
    assert_equal([call(*dealt)], [found])


@pytest.mark.usefixtures("quick")
def test_functions_among_the_operands():
    mesh, inputs = mesh_of(s=4), arrays(40)
    spec, given = sa.linear("phi"), {"phi": lambda x: jnp.exp(x)}
    found = sa.sharded_attention(*inputs, spec, mesh=mesh, sequence="s", operands=given)
    assert_equal([found], [sa.attention(*inputs, spec, operands=given)], atol=1e-4)


@pytest.mark.usefixtures("quick")
def test_bfloat16_and_few_queries():
    mesh = mesh_of(s=4)
    q, k, v = arrays(64, dtype=jnp.bfloat16)
    spec = sa.where(lambda q, k: (k <= 2 * q) & (2 * q - k <= 11))
    found = sa.sharded_attention(q[:, :32], k, v, spec, mesh=mesh, sequence="s")
    wanted = sa.attention(q[:, :32], k, v, spec)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted.astype(jnp.float32), atol=2e-2
    )


def test_a_query_without_keys_yields_nothing():
    mesh = mesh_of(s=8)
    spec = C & sa.window(3) & sa.where(lambda q, k: q < 20)
    options = {"mesh": mesh, "sequence": "s", "return_lse": True, "impl": "reference"}
    out, lse = sa.sharded_attention(*arrays(), spec, **options)
    assert not out[:, 20:].any()
    assert np.isneginf(lse[:, :, 20:]).all()


# --- bad input ---


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "no axis of the mesh", {"sequence": "x"}),
        (ValueError, "two uses", {"sequence": "s", "batch": "s"}),
        (ValueError, "batch of 3 is no multiple", {"batch": "s"}),
        (ValueError, "heads of 4 is no multiple", {"heads": "t"}),
        (ValueError, "no part of", {"sequence": "s", "operands": {"x": np.ones(3)}}),
        (ValueError, "pass both", {"sequence": "s", "q_segment_ids": np.ones((3, 61))}),
        (ValueError, "dropout_key", {"sequence": "s", "dropout_rate": 0.5}),
    ],
)
def test_bad_options(error, words, options):
    mesh = mesh_of(s=2, t=3)
    with pytest.raises(error, match=words):
        sa.sharded_attention(*arrays(batch=3), C, mesh=mesh, **options)


def test_an_array_of_another_length():
    given = {"b": np.ones((2, 4, 60), np.float32)}
    spec = sa.softmax(C, bias=sa.key_bias("b"))
    with pytest.raises(ValueError, match="entry for each of 61 tokens"):
        sa.sharded_attention(
            *arrays(), spec, mesh=mesh_of(s=2), sequence="s", operands=given
        )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (sa.heads((C, 2), (sa.linear("elu1"), 2)), "is no map"),
        (C & sa.topk(2, block=4, scope="overall"), "compare several heads"),
        (sa.scatter_mean(sa.kmeans(2)), "cannot take it"),
    ],
)
def test_heads_that_cannot_be_dealt(spec, words):
    with pytest.raises(NotImplementedError, match=words):
        sa.sharded_attention(*arrays(), spec, mesh=mesh_of(h=2), heads="h")


def test_key_heads_that_do_not_fit_the_devices():
    q, k, v = arrays(40, heads=12, kv_heads=3)
    with pytest.raises(ValueError, match="3 heads"):
        sa.sharded_attention(q, k, v, C, mesh=mesh_of(h=4), heads="h")
