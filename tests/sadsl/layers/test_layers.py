"""The layers against dense attention on their own parameters, and against Flax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sadsl as sa
from sadsl.layers import attention_fn
from sadsl.layers import linen as sparse_linen
from sadsl.layers import nnx as sparse_nnx

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

SPEC = "causal() & (window(5) | sinks(2))"
BATCH, SEQ, FEATURES, HEADS = 2, 29, 24, 4


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def by_hand(params, x, kv, pairs):
    """The layer written out; ``pairs`` is ``[batch or 1, heads, q, kv]``."""
    project = lambda name, y: jnp.einsum("bsf,fhd->bshd", y, params[name]["kernel"])
    q, k, v = project("query", x), project("key", kv), project("value", kv)
    k, v = (jnp.repeat(y, q.shape[2] // k.shape[2], axis=2) for y in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(pairs, s, -jnp.inf), axis=-1)
    o = jnp.einsum("bhqk,bkhd->bqhd", p, v)
    return jnp.einsum("bqhd,hdf->bqf", o, params["out"]["kernel"])


def nnx_layer(spec=SPEC, **options):
    return sparse_nnx.SparseAttention(
        spec=spec, num_heads=HEADS, in_features=FEATURES, rngs=nnx.Rngs(1), **options
    )


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_nnx_equals_dense_values_and_gradients(kv_heads):
    layer = nnx_layer(num_kv_heads=kv_heads)
    x, params = normal(BATCH, SEQ, FEATURES), params_of(layer)
    pairs = jnp.asarray(sa.parse(SPEC).dense(SEQ))[None]
    weights = normal(BATCH, SEQ, FEATURES, seed=3)

    def loss(layer, x):
        return jnp.sum(layer(x) * weights)

    def expected(params, x):
        return jnp.sum(by_hand(params, x, x, pairs) * weights)

    np.testing.assert_allclose(layer(x), by_hand(params, x, x, pairs), atol=2e-6)
    found = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, x)
    wanted = jax.grad(expected, argnums=(0, 1))(params, x)
    np.testing.assert_allclose(found[1], wanted[1], atol=3e-5)
    for name, gradient in nnx.to_pure_dict(found[0]).items():
        np.testing.assert_allclose(
            gradient["kernel"], wanted[0][name]["kernel"], atol=3e-5
        )


@pytest.mark.slow
def test_nnx_cross_attention_and_segments():
    layer = nnx_layer("segments()", head_dim=5, out_features=7)
    x, kv = normal(BATCH, SEQ, FEATURES), normal(BATCH, 13, FEATURES, seed=2)
    q_ids = jnp.tile(jnp.arange(SEQ) // 10, (BATCH, 1))
    kv_ids = jnp.tile(jnp.arange(13) // 4, (BATCH, 1))
    pairs = (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    found = layer(x, kv, q_segment_ids=q_ids, kv_segment_ids=kv_ids)
    assert found.shape == (BATCH, SEQ, 7)
    np.testing.assert_allclose(
        found, by_hand(params_of(layer), x, kv, pairs), atol=2e-6
    )


def test_nnx_operands_reach_the_map():
    spec = sa.where(lambda q, k: k < sa.operand("length"))
    layer = nnx_layer(spec)
    x, lengths = normal(BATCH, SEQ, FEATURES), jnp.array([7, 20])
    pairs = jnp.broadcast_to(
        jnp.arange(SEQ)[None, None, None, :] < lengths[:, None, None, None],
        (BATCH, 1, SEQ, SEQ),
    )
    found = layer(x, operands={"length": lengths})
    np.testing.assert_allclose(found, by_hand(params_of(layer), x, x, pairs), atol=2e-6)


def test_transform_qk_is_applied_to_queries_and_keys():
    x = normal(BATCH, SEQ, FEATURES)
    plain = nnx_layer()
    scaled = nnx_layer(transform_qk=lambda q, k: (2.0 * q, 0.5 * k))
    np.testing.assert_allclose(scaled(x), plain(x), atol=2e-6)
    # Queries of 0 weigh all visible keys alike.
    flat, params = nnx_layer(transform_qk=lambda q, k: (0.0 * q, k)), params_of(plain)
    params["query"]["kernel"] *= 0
    pairs = jnp.asarray(sa.parse(SPEC).dense(SEQ))[None]
    np.testing.assert_allclose(flat(x), by_hand(params, x, x, pairs), atol=2e-6)
    assert not np.allclose(flat(x), plain(x), atol=0.1)


def test_spec_may_be_text_map_or_term():
    x = normal(BATCH, SEQ, FEATURES)
    outs = [
        nnx_layer(spec)(x)
        for spec in (SPEC, sa.parse(SPEC), sa.softmax(sa.parse(SPEC)))
    ]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    layer, x = (
        nnx_layer(dtype=jnp.bfloat16, use_bias=True),
        normal(BATCH, SEQ, FEATURES),
    )
    out, wide = layer(x), nnx_layer(use_bias=True)(x)
    assert (out.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    assert layer.query.kernel[...].dtype == layer.query.bias[...].dtype == jnp.float32
    # The parameters are those of the other layer: only the rounding differs.
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=0.05)
    assert not np.array_equal(out.astype(jnp.float32), wide)


def test_layers_built_alike_share_one_compilation():
    traces, x = [], normal(BATCH, SEQ, FEATURES)

    @nnx.jit
    def run(layer, x):
        traces.append(layer.term)
        return layer(x)

    outs = [run(nnx_layer(spec), x) for spec in (SPEC, sa.parse(SPEC), SPEC)]
    assert len(traces) == 1
    np.testing.assert_array_equal(outs[0], outs[1])
    run(nnx_layer("causal()"), x)
    assert traces == [sa.softmax(sa.parse(SPEC)), sa.softmax(sa.causal())]
    assert attention_fn("causal()") == attention_fn(sa.causal())
    assert attention_fn("causal()") != attention_fn("full()")


@pytest.mark.slow
def test_linen_equals_nnx():
    x = normal(BATCH, SEQ, FEATURES)
    layer = sparse_linen.SparseAttention(
        SPEC, num_heads=HEADS, num_kv_heads=2, transform_qk=lambda q, k: (3.0 * q, k)
    )
    same = nnx_layer(num_kv_heads=2, transform_qk=lambda q, k: (3.0 * q, k))
    variables = {"params": params_of(same)}
    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x))
    assert shapes == jax.tree.map(jnp.shape, variables)
    found = jax.jit(layer.apply)(variables, x)
    np.testing.assert_allclose(found, same(x), atol=1e-6)
    kv = normal(BATCH, 40, FEATURES, seed=2)
    np.testing.assert_allclose(layer.apply(variables, x, kv), same(x, kv), atol=1e-6)
    weights = normal(BATCH, SEQ, FEATURES, seed=3)
    loss = lambda v: jnp.sum(layer.apply(v, x) * weights)
    gradient = jax.jit(jax.grad(loss))(variables)["params"]
    wanted = nnx.jit(nnx.grad(lambda m, x: jnp.sum(m(x) * weights)))(same, x)
    for name, of_nnx in nnx.to_pure_dict(wanted).items():
        assert np.abs(of_nnx["kernel"]).max() > 0.01
        np.testing.assert_allclose(
            gradient[name]["kernel"], of_nnx["kernel"], atol=3e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, r"num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 0}, r"num_kv_heads=0 must be at least 1"),
        ({"spec": "causal() & windw(3)"}, r"at position 11, .*unknown name 'windw'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nnx_layer(**options)
    x = normal(BATCH, SEQ, FEATURES)
    with pytest.raises(ValueError, match=message):
        sparse_linen.SparseAttention(
            **{"spec": SPEC, "num_heads": HEADS} | options
        ).init(jax.random.key(0), x)


def test_features_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"in_features=10 must be .*head_dim"):
        sparse_nnx.SparseAttention(SPEC, 4, 10, rngs=nnx.Rngs(0))


def flax_nnx(fn, **options):
    return nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=fn, decode=False, rngs=nnx.Rngs(0), **options
    )


def test_flax_nnx_layer_with_a_causal_spec_equals_its_own():
    x, mask = normal(BATCH, SEQ, FEATURES), nnx.make_causal_mask(jnp.ones((BATCH, SEQ)))
    mine, own = flax_nnx(attention_fn("causal()")), flax_nnx(nnx.dot_product_attention)
    np.testing.assert_allclose(mine(x), own(x, mask=mask), atol=2e-6)
    found = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum()))(mine, x)
    wanted = nnx.grad(lambda m, x: (m(x, mask=mask) ** 2).sum())(own, x)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.slow
def test_flax_linen_layer_with_a_causal_spec_equals_its_own():
    x, mask = (
        normal(BATCH, SEQ, FEATURES),
        linen.make_causal_mask(jnp.ones((BATCH, SEQ))),
    )
    mine = linen.MultiHeadDotProductAttention(
        HEADS, attention_fn=attention_fn("causal()"), force_fp32_for_softmax=True
    )
    own = linen.MultiHeadDotProductAttention(HEADS)
    variables = own.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        mine.apply(variables, x), own.apply(variables, x, mask=mask), atol=2e-6
    )
    found = jax.grad(lambda v: (mine.apply(v, x) ** 2).sum())(variables)
    wanted = jax.grad(lambda v: (own.apply(v, x, mask=mask) ** 2).sum())(variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found, wanted
    )


def test_is_causal_adds_the_causal_map():
    x, own = normal(BATCH, SEQ, FEATURES), flax_nnx(nnx.dot_product_attention)
    mine = flax_nnx(attention_fn("full()"))
    np.testing.assert_allclose(
        mine(x, is_causal=True), own(x, is_causal=True), atol=2e-6
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_number_of_batch_axes(batch):
    q, k, v = (normal(*batch, 9, 2, 8, seed=s) for s in range(3))
    found = attention_fn("full()")(q, k, v)
    np.testing.assert_allclose(found, nnx.dot_product_attention(q, k, v), atol=2e-6)


def test_dtype_is_that_of_the_computation():
    q, k, v = (normal(1, 9, 2, 8, seed=s) for s in range(3))
    found = attention_fn("full()")(q, k, v, dtype=jnp.bfloat16)
    narrow = (x.astype(jnp.bfloat16) for x in (q, k, v))
    wanted = sa.attention(*narrow, sa.full())
    assert found.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": object()}, r"module=.*sow_weights=False"),
        ({"qk_attn_weights_einsum": jnp.einsum}, r"qk_attn_weights_einsum_cls=None"),
        ({"input_positions": jnp.arange(9)}, r"input_positions=.*leave it out"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    q = normal(1, 9, 2, 8)
    with pytest.raises(NotImplementedError, match=message):
        attention_fn("full()")(q, q, q, **options)


@pytest.mark.parametrize(("rate", "deterministic"), [(0.1, True), (0.0, False)])
def test_dropout_that_is_switched_off_drops_nothing(rate, deterministic):
    q, k, v = (normal(1, 9, 2, 8, seed=s) for s in range(3))
    found = attention_fn("full()")(
        q, k, v, dropout_rate=rate, deterministic=deterministic,
        dropout_rng=jax.random.key(5),
    )  # fmt: skip
    np.testing.assert_array_equal(found, sa.attention(q, k, v, sa.full()))


def test_dropout_is_that_of_attention():
    q, k, v = (normal(1, 9, 2, 8, seed=s) for s in range(3))
    key = jax.random.key(5)
    found = attention_fn("causal()")(
        q, k, v, dropout_rate=0.5, dropout_rng=key, broadcast_dropout=False
    )
    wanted = sa.attention(q, k, v, sa.causal(), dropout_rate=0.5, dropout_key=key)
    np.testing.assert_array_equal(found, wanted)
    assert not np.allclose(found, sa.attention(q, k, v, sa.causal()), atol=0.1)
    with pytest.raises(ValueError, match=r"dropout_rate=0.5 without dropout_key"):
        attention_fn("causal()")(q, k, v, dropout_rate=0.5)


def test_dropout_of_all_layers():
    """While training each call drops other weights; then none."""
    x = normal(BATCH, SEQ, FEATURES)
    layer = nnx_layer(dropout_rate=0.5)
    plain, params = nnx_layer()(x), params_of(layer)
    assert not np.allclose(layer(x), layer(x), atol=1e-3)
    np.testing.assert_array_equal(
        layer(x, rngs=nnx.Rngs(dropout=3)), layer(x, rngs=nnx.Rngs(dropout=3))
    )
    np.testing.assert_allclose(layer(x, deterministic=True), plain, atol=1e-6)
    layer.eval()
    np.testing.assert_allclose(layer(x), plain, atol=1e-6)
    other = sparse_linen.SparseAttention(SPEC, HEADS, dropout_rate=0.5)
    call = jax.jit(other.apply, static_argnames="deterministic")
    dropped = [
        call(
            {"params": params}, x, deterministic=False,
            rngs={"dropout": jax.random.key(i)},
        )
        for i in (0, 0, 1)
    ]  # fmt: skip
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], dropped[2], atol=1e-3)
    found = call({"params": params}, x, deterministic=True)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    flax_own = flax_nnx(attention_fn(SPEC), dropout_rate=0.5, deterministic=False)
    first, second = (flax_own(x, rngs=nnx.Rngs(dropout=i)) for i in (1, 2))
    assert not np.allclose(first, second, atol=1e-3)


def test_flax_layers_hand_their_requests_over_to_be_refused():
    x = normal(BATCH, SEQ, FEATURES)
    fn = attention_fn("causal()")
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
    with pytest.raises(NotImplementedError, match=r"module=.*sow_weights=False"):
        layer.init(jax.random.key(0), x, sow_weights=True)
    with pytest.raises(NotImplementedError, match=r"module=.*sow_weights=False"):
        flax_nnx(fn)(x, sow_weights=True)


def test_attention_fn_refuses_a_spec_of_run_time_arrays():
    with pytest.raises(ValueError, match=r"kv_segment_ids.*SparseAttention"):
        attention_fn("causal() & segments()")


def test_importing_the_package_does_not_import_flax():
    code = "import sys, sadsl, sadsl.layers; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
