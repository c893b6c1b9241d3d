"""The public call: every backend against float64, transforms, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import strategies
from calls import BACKENDS, IMPLS, SMALL, arrays, assert_matches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from laws import few

import sadsl as sa

SPECS = [
    "causal() & (window(20) | sinks(3))",
    "causal() - window(5)",  # the first rows are empty
    "queries(10, 30) & keys(5, 40)",
    "per_head(causal() & window(9), strided(5) & causal(), blocks(13), full())",
    "where(lambda q, k: (q * 3 + k) // 7 % 2 == 0)",
    "dilated(3, 2, 4) | offsets({-40, 33})",
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", SPECS)
def test_specs(impl, spec):
    q, k, v, do = arrays()
    pairs = sa.parse(spec).dense(70, num_heads=4)[None]
    assert_matches(impl, spec, pairs, q, k, v, do)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_permutations_and_tables(impl):
    order = np.random.default_rng(3).permutation(70)
    spec = (sa.causal() & sa.window(9)).permute(order)
    q, k, v, do = arrays()
    assert_matches(impl, spec, spec.dense(70, num_heads=4)[None], q, k, v, do)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_and_value_dim_differ(impl):
    q, k, v, do = arrays(q_len=33, kv_len=57, dim=16, dim_v=32)
    spec = sa.window(20, 20)
    pairs = spec.dense(33, 57, num_heads=4)[None]
    assert_matches(impl, spec, pairs, q, k, v, do)


@pytest.mark.parametrize("impl", IMPLS)
def test_segments(impl):
    q, k, v, do = arrays()
    rng = np.random.default_rng(1)
    ids = np.sort(rng.integers(0, 4, (2, 70)), axis=1).astype(np.int32)
    pairs = np.stack(
        [np.broadcast_to(np.tril(i[:, None] == i[None, :]), (4, 70, 70)) for i in ids]
    )
    ids = {"q_segment_ids": jnp.asarray(ids), "kv_segment_ids": jnp.asarray(ids)}
    assert_matches(impl, "causal() & segments()", pairs, q, k, v, do, **ids)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_operands_by_query_head_and_batch(impl):
    text = (
        "where(lambda q, k, h: (k <= q) & ((q - k <= operand('span')[h])"
        " | (k < operand('prefix'))) | (k == operand('pick')[q]))"
    )
    span, prefix = np.array([0, 5, 9, 60]), np.array([4, 30])
    pick = np.random.default_rng(0).integers(0, 70, (2, 70))
    position, key = np.arange(70)[:, None], np.arange(70)[None, :]
    pairs = np.zeros((2, 4, 70, 70), bool)
    for b in range(2):
        for h in range(4):
            near = (position - key <= span[h]) | (key < prefix[b])
            pairs[b, h] = (key <= position) & near | (key == pick[b][:, None])
    given_arrays = {"span": span, "prefix": prefix, "pick": pick}
    operands = {name: jnp.asarray(x) for name, x in given_arrays.items()}
    q, k, v, do = arrays()
    assert_matches(impl, text, pairs, q, k, v, do, operands=operands)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_query_offset(impl):
    q, k, v, do = arrays(q_len=20, kv_len=70)
    spec = sa.causal() & (sa.window(30) | sa.strided(9))
    pairs = spec.dense(70, num_heads=4)[:, 50:][None]
    assert_matches(impl, spec, pairs, q, k, v, do, q_offset=50)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_soft_cap(impl):
    q, k, v, do = arrays()
    spec = sa.softmax(sa.causal(), logits_soft_cap=1.5)
    pairs = sa.causal().dense(70, num_heads=4)[None]
    assert_matches(impl, spec, pairs, q, k, v, do, soft_cap=1.5)


@settings(max_examples=few(6, least=2), suppress_health_check=list(HealthCheck))
@given(
    strategies.with_heads(),
    st.sampled_from([(1, 1), (13, 33), (60, 60), (45, 20)]),
    st.sampled_from([5, 16, 32]),
)
def test_random_maps_on_the_cpu_path(spec, lengths, block):
    q_len, kv_len = lengths
    q, k, v, do = arrays(1, q_len, kv_len, 6, 3, 8, 8)
    pairs = spec.dense(q_len, kv_len, num_heads=6)[None]
    config = sa.KernelConfig(block_q=block, block_kv=block)
    assert_matches("xla", spec, pairs, q, k, v, do, config=config)


@pytest.mark.parametrize("impl", ["tpu", "triton"])
@settings(max_examples=few(2, least=1), suppress_health_check=list(HealthCheck))
@given(strategies.with_heads())
def test_random_maps_on_kernels(impl, spec):
    q, k, v, do = arrays(1, 45, 50, 6, 3, 16, 16)
    pairs = spec.dense(45, 50, num_heads=6)[None]
    assert_matches(impl, spec, pairs, q, k, v, do)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_key(impl):
    q, k, v, do = arrays()
    options = BACKENDS[impl] | {"impl": impl}
    spec = sa.queries(5, 9)

    def loss(q, k, v):
        out, lse = sa.attention(q, k, v, spec, return_lse=True, **options)
        return jnp.sum(out * do), (out, lse)

    grads, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    empty = np.r_[0:5, 9:70]
    assert np.all(np.asarray(out)[:, empty] == 0)
    assert np.all(np.isneginf(np.asarray(lse)[:, :, empty]))
    assert np.all(np.asarray(grads[0])[:, empty] == 0)
    assert all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_transforms(impl):
    q, k, v, _ = arrays(batch=4, q_len=40, kv_len=40)
    options = BACKENDS[impl] | {"impl": impl}

    def loss(q, k, v):
        out = sa.attention(q, k, v, "causal() & window(9)", **options)
        return jnp.sum(jnp.square(out))

    expected = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    def assert_same(found):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            found,
            expected,
        )

    assert_same(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))
    assert_same(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2))(q, k, v))
    # vmap over an extra axis of single-example calls
    one = lambda *x: jax.value_and_grad(loss, argnums=(0, 1, 2))(*(a[None] for a in x))
    total, grads = jax.vmap(one)(q, k, v)
    assert_same((total.sum(), tuple(g[:, 0] for g in grads)))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", [0, 2])
def test_shard_map_over_batch_or_heads(impl, axis):
    q, k, v, _ = arrays(batch=4, heads=4, kv_heads=4, q_len=40, kv_len=40)
    options = BACKENDS[impl] | {"impl": impl}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(*("x" if i == axis else None for i in range(3)))

    def call(q, k, v):
        return sa.attention(q, k, v, "causal() & window(9)", **options)

    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    loss = lambda f: lambda *x: jnp.sum(jnp.square(f(*x)))
    found = jax.jit(jax.value_and_grad(loss(sharded), argnums=(0, 1, 2)))(q, k, v)
    expected = jax.value_and_grad(loss(call), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "impl", ["xla", "tpu", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_second_derivatives(impl):
    q, k, v, do = arrays(1, 20, 20, 2, 1, 8, 8)

    def slope(options):
        def loss(q, k, v):
            out, lse = sa.attention(
                q, k, v, "causal() & window(6)", return_lse=True, **options
            )
            return jnp.sum(out * do) + jnp.sum(jnp.sin(lse))

        grads = jax.grad(loss, argnums=(0, 1, 2))
        return lambda *x: sum(jnp.sum(jnp.cos(g)) for g in grads(*x))

    options = BACKENDS[impl] | {"impl": impl}
    found = jax.grad(slope(options), argnums=(0, 1, 2))(q, k, v)
    expected = jax.grad(slope({"impl": "reference"}), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    q, k, v, _ = (x.astype(dtype) for x in arrays())
    out = sa.attention(q, k, v, "causal()")
    assert out.dtype == dtype
    wide = sa.attention(*(x.astype("float32") for x in (q, k, v)), "causal()")
    oracle.assert_close(out, np.asarray(wide, np.float64), dtype)


def test_new_segment_ids_do_not_recompile():
    q, k, v, _ = arrays()
    traces = []

    @jax.jit
    def call(q, k, v, ids):
        traces.append(1)
        return sa.attention(
            q, k, v, "causal() & segments()", q_segment_ids=ids, kv_segment_ids=ids
        )

    first = call(q, k, v, jnp.zeros((2, 70), jnp.int32))
    second = call(q, k, v, jnp.asarray(np.arange(70) // 9)[None].repeat(2, 0))
    assert traces == [1]
    assert not np.allclose(first, second)


def test_options_never_change_the_result():
    q, k, v, _ = arrays()
    outs = [
        sa.attention(q, k, v, "causal() & window(20)", config=c, impl="xla")
        for c in (None, SMALL, sa.KernelConfig(block_q=16, block_kv=64))
    ]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=2e-6)


IDS = jnp.zeros((2, 70), jnp.int32)
BAD = [
    ({"q": np.zeros((2, 70, 64), "float32")}, "q has shape .* four axes"),
    ({"k": np.zeros((2, 71, 2, 16), "float32")}, "v has shape .* must be"),
    ({"k": np.zeros((1, 70, 2, 16), "float32")}, "k has shape .* must be"),
    ({"k": np.zeros((2, 70, 3, 16), "float32"),
      "v": np.zeros((2, 70, 3, 16), "float32")},
     "q has 4 heads, k and v have 3"),
    ({"k": np.zeros((2, 70, 2, 8), "float32")}, "k has head_dim 8, q has 16"),
    ({"v": np.zeros((2, 70, 2, 16), "float16")}, "v has dtype float16, q has float32"),
    ({"q": np.zeros((2, 70, 4, 16), "int32")}, "q has dtype int32"),
    ({"q": np.zeros((2, 0, 4, 16), "float32")}, "no axis may be empty"),
    ({"spec": "causal() & segments()"}, "'kv_segment_ids', which was not given"),
    ({"q_segment_ids": IDS, "kv_segment_ids": IDS}, "no part of the map reads it"),
    ({"spec": "segments()", "q_segment_ids": IDS}, "without kv_segment_ids"),
    ({"spec": "segments()", "q_segment_ids": IDS[:, :9], "kv_segment_ids": IDS},
     "'q_segment_ids' has shape .9,. .* is indexed by `q` from 0 to 69"),
    ({"spec": "segments()", "q_segment_ids": jnp.zeros((3, 70), jnp.int32),
      "kv_segment_ids": IDS}, "a batch axis of 2"),
    ({"spec": "segments()", "q_segment_ids": IDS.astype("float32"),
      "kv_segment_ids": IDS}, "must be of integers"),
    ({"spec": "where(lambda q, k: k < operand('n'))"}, "'n', which was not given"),
    ({"operands": {"x": np.arange(3)}}, "'x' was given, but no part of the map"),
    ({"spec": "per_head(causal(), full(), blocks(3))"}, "do not divide 4 heads"),
    ({"spec": sa.causal().permute(range(60))}, "permutation\\) of 60 entries"),
    ({"spec": "where(lambda q, k: table((1, 2, 3))[q] == k)"}, "of 3 entries is"),
    ({"impl": "cuda"}, "impl='cuda': must be None or one of"),
    ({"impl": "tpu"}, "impl='tpu' cannot run on the default device"),
    ({"impl": "triton"}, "impl='triton' cannot run on the default device"),
    ({"q_offset": -1}, "q_offset=-1 must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, message):
    q, k, v, _ = arrays()
    call = {"q": q, "k": k, "v": v, "spec": "causal()"} | change
    with pytest.raises(ValueError, match=message):
        sa.attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_bad_types():
    q, k, v, _ = arrays()
    with pytest.raises(TypeError, match="must be an index map"):
        sa.attention(q, k, v, 3)
    with pytest.raises(TypeError, match=r"q_offset=1\.5 must be an integer"):
        sa.attention(q, k, v, "causal()", q_offset=1.5)
    with pytest.raises(ValueError, match="block_q=0: must be an integer"):
        sa.attention(
            q,
            k,
            v,
            "causal()",
            config=sa.KernelConfig(dq=sa.Tile(block_q=0, block_kv=3)),
        )
    with pytest.raises(ValueError, match="block_q=0"):
        sa.attention(q, k, v, "causal()", config=sa.KernelConfig(block_q=0))


def test_a_large_table_indexed_by_both_sides_is_a_bit_for_each_pair():
    q, k, v, _ = arrays()
    values = tuple(range(100))
    spec = sa.where(lambda q, k: sa.table(values)[(q - k) % 100] < 30)
    found, expected = (
        sa.attention(q, k, v, spec, impl=x) for x in ("xla", "reference")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
