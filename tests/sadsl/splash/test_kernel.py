"""Kernels of ``sadsl.splash`` against the reference of jax's splash attention."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as of_jax,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as jax_masks,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sadsl as sa
from sadsl import splash
from sadsl.splash.kernel import make_splash_mha_single_device as make

HEADS, Q, K, DIM = 4, 37, 50, 8
SHAPE = Q, K
DRAW = np.random.default_rng(0)
PAIRS = DRAW.random(SHAPE) < 0.4
PAIRS[:, 0] = True


def floats(*shape):
    draw = np.random.default_rng(len(shape) + shape[0])
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


def arrays(kv_heads=2):
    kv = (kv_heads, K, DIM) if kv_heads else (K, DIM)
    return floats(HEADS, Q, DIM), floats(*kv), jnp.cos(floats(*kv) * 3)


class Case(NamedTuple):
    """Arguments of a kernel and of its calls; every query of each sees a key."""

    masks: Any
    options: Mapping[str, Any] = MappingProxyType({})
    kv_heads: int = 2
    ids: Any = None
    sinks: bool = False


IDS = of_jax.SegmentIds(*(jnp.arange(n, dtype=jnp.int32) // 9 for n in SHAPE))
CASES = {
    "documents": Case(
        [jax_masks.CausalMask(SHAPE)] * 4, {"attn_logits_soft_cap": 2.0}, ids=IDS
    ),
    "by head": Case(
        [
            splash.LocalMask(SHAPE, (5, 9), 1),
            splash.NumpyMask(PAIRS),
            splash.CausalMask(SHAPE) & splash.ChunkedCausalMask(SHAPE, 16),
            jax_masks.FullMask(SHAPE),
        ],
        {"is_mqa": True, "block_sizes": of_jax.BlockSizes.get_default()},
        kv_heads=0,
        sinks=True,
    ),
    "array": Case(np.stack([PAIRS, PAIRS[::-1], PAIRS, PAIRS])),
    "run time": Case(jnp.asarray(np.stack([PAIRS, PAIRS[::-1], PAIRS, PAIRS]))),
}


def mask_of(case):
    masks = case.masks
    return masks if hasattr(masks, "shape") else splash.MultiHeadMask(masks)


@pytest.mark.parametrize(
    "name",
    [n if n == "by head" else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
@pytest.mark.usefixtures("quick")
def test_values_and_gradients_are_those_of_jax(name):
    case = CASES[name]
    kernel = make(mask_of(case), save_residuals=True, **case.options)
    mask = mask_of(case)
    dense = np.asarray(mask[:, :, :])
    reference = of_jax.make_attention_reference(
        dense, is_mqa=case.options.get("is_mqa", False)
    )
    cap = case.options.get("attn_logits_soft_cap")
    theirs = partial(reference, save_residuals=True, attn_logits_soft_cap=cap)
    sinks = floats(HEADS) if case.sinks else None

    def loss(run, q, k, v, sinks):
        out, (lse,) = run(q, k, v, case.ids, sinks)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    at = (1, 2, 3, 4) if case.sinks else (1, 2, 3)
    of = jax.value_and_grad(loss, at, has_aux=True)
    args = *arrays(case.kv_heads), sinks
    found, wanted = (jax.jit(partial(of, run))(*args) for run in (kernel, theirs))
    assert found[0][1][0].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("quick")
def test_a_batch_by_vmap_and_a_query_without_keys():
    """The first three queries see no key: 0, and no weight at all."""
    kernel = make(
        splash.MultiHeadMask([splash.CausalMask(SHAPE, offset=-3)] * HEADS),
        save_residuals=True,
    )
    twice = [jnp.stack([x, -x]) for x in arrays()]
    ids = splash.SegmentIds(*(jnp.zeros((2, n), jnp.int32) for n in SHAPE))
    out, (lse,) = jax.jit(jax.vmap(kernel, (0, 0, 0, 0, None)))(*twice, ids, None)
    np.testing.assert_array_equal(out[:, :, :3], 0)
    assert np.isneginf(lse[:, :, :3]).all()
    q, k, v = twice
    term = sa.where(lambda q, k: k <= q - 3)
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    wanted = sa.attention(
        swap(q), swap(k), swap(v), term, sm_scale=1.0, impl="reference"
    )
    np.testing.assert_allclose(out, swap(wanted), atol=2e-5)


def test_a_kernel_is_a_pytree():
    """Built under jit, returned, mapped over, and passed to a compiled call."""
    pairs = DRAW.random((HEADS, *SHAPE)) < 0.4
    kernel = jax.jit(make)(jnp.asarray(pairs))
    (leaf,) = jax.tree.leaves(kernel)
    assert leaf.shape == pairs.shape
    found = jax.jit(lambda kernel, *x: kernel(*x))(kernel, *arrays())
    q, k, v = (np.asarray(x, float) for x in arrays())
    scores = q @ np.repeat(k, 2, axis=0).swapaxes(1, 2)
    weights = np.where(pairs, np.exp(scores), 0)
    wanted = weights @ np.repeat(v, 2, axis=0) / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    causal = splash.MultiHeadMask([splash.CausalMask(SHAPE)] * HEADS)
    static = jax.jit(lambda: make(causal))()
    assert jax.tree.leaves(static) == []
    assert jax.tree.structure(static) == jax.tree.structure(make(causal))


def test_large_scattered_masks_are_leaves():
    array = np.random.default_rng(3).random((600, 601)) < 0.5
    masks = [splash.NumpyMask(array), splash.CausalMask(array.shape)]
    kernel = make(splash.MultiHeadMask(masks * 2))
    assert [x.shape for x in jax.tree.leaves(kernel)] == [array.shape]


def balanced(shape):
    mask = splash.CausalMask(shape)
    mask.q_sequence = np.r_[0:10, 30:40, 10:30].astype(np.int32)
    return mask


SHARDED = {
    "one mask": lambda n: [splash.CausalMask(n)] * 4,
    "by head": lambda n: [splash.CausalMask(n), splash.LocalMask(n, (6, 3), 0)] * 2,
    "array": lambda n: [splash.NumpyMask(np.tri(*n, dtype=bool))] * 4,
    "balanced": lambda n: [balanced(n)] * 4,
    "map": lambda n: [splash.MapMask(n, sa.causal() & sa.window(7))] * 4,
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_heads_and_queries_over_devices(name):
    shape = 40, 40
    mask = splash.MultiHeadMask(SHARDED[name](shape))
    mesh = jax.make_mesh((2, 2), ("h", "q"), axis_types=(AxisType.Auto,) * 2)
    kernel = splash.make_splash_mha(mask, head_shards=2, q_seq_shards=2)
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, P("h", "q")))
    x = [floats(4, 40, DIM), floats(4, 41, DIM)[:, 1:], floats(4, 42, DIM)[:, 2:]]

    def run(kernel, q, k, v):
        out, pull = jax.vjp(kernel, q, k, v)
        dq, dk, dv = pull(jnp.cos(out))
        return out, dq, dk, dv

    def shard(kernel, q, k, v):
        # Keys are on every device of "q", so the map sums their gradients.
        out, dq, dk, dv = run(kernel, q, k, v)
        return out, dq, jax.lax.psum(dk, "q"), jax.lax.psum(dv, "q")

    rows, heads = P("h", "q"), P("h")
    found = jax.jit(
        jax.shard_map(
            shard, mesh=mesh, in_specs=(specs, rows, heads, heads),
            out_specs=(rows, rows, heads, heads), check_vma=False,
        )
    )(kernel, *x)  # fmt: skip
    wanted = jax.jit(run)(make(mask), *x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", ["by head", "run time"])
@pytest.mark.slow
def test_the_kernel_of_tpus(name):
    case = CASES[name]
    sinks = floats(HEADS) if case.sinks else None
    args = *arrays(case.kv_heads), case.ids, sinks
    found = make(mask_of(case), impl="tpu", interpret=True, **case.options)(*args)
    wanted = make(mask_of(case), **case.options)(*args)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.slow
def test_the_output_has_the_dtype_of_q():
    causal = splash.MultiHeadMask([splash.CausalMask(SHAPE)] * HEADS)
    q, k, v = arrays()
    with jax.numpy_dtype_promotion("standard"):
        out = make(causal)(q.astype("bfloat16"), k, v)
        assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype("float32"), make(causal)(q, k, v), atol=0.1)


def count(jaxpr, *names):
    """How many equations have one of these primitives, in all jaxprs inside."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in names
        for inner in () if eqn.primitive.name == "pallas_call" else eqn.params.values():
            for x in inner if isinstance(inner, (tuple, list)) else (inner,):
                x = getattr(x, "jaxpr", x)
                total += count(x, *names) if hasattr(x, "eqns") else 0
    return total


@pytest.mark.parametrize(("impl", "kernels"), [("xla", 1), ("triton", 3), ("tpu", 2)])
def test_the_residual_name_spares_the_forward_pass(impl, kernels):
    shape = 128, 128
    mask = splash.MultiHeadMask([splash.CausalMask(shape)] * 2)
    kernel = make(mask, residual_checkpoint_name="context", impl=impl)

    def forward_and_backward(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        run = jax.checkpoint(lambda q: jnp.sin(2 * kernel(q, q, q)), policy=policy)
        x = jnp.ones((2, 128, 64))
        jaxpr = jax.make_jaxpr(jax.grad(lambda q: run(q).sum()))(x).jaxpr
        kernels = count(jaxpr, "pallas_call", "attention_derivative")
        return kernels, count(jaxpr, "dot_general")

    saved, repeated = forward_and_backward("context"), forward_and_backward("other")
    assert saved[0] == kernels
    # Another forward pass is one kernel more, or products of the XLA path.
    assert repeated[0] > kernels or repeated[1] > saved[1]
    assert forward_and_backward("attn_out", "attn_lse") == saved


def test_block_sizes_are_those_of_jax():
    for given in (
        {"block_q": 8, "block_kv": 16},
        {"block_q": 8, "block_kv": 16, "block_q_dkv": 4, "block_kv_dkv": 2},
        {"block_q": 8, "block_kv": 16, "block_q_dkv": 4, "block_kv_dkv": 2}
        | {"use_fused_bwd_kernel": True},
    ):
        ours, theirs = splash.BlockSizes(**given), of_jax.BlockSizes(**given)
        assert ours.block_kv_compute == theirs.block_kv_compute
        assert ours.block_kv_dkv_compute == theirs.block_kv_dkv_compute
        assert ours.has_backward_blocks == theirs.has_backward_blocks
        assert ours.q_layout == theirs.q_layout == splash.QKVLayout.HEAD_DIM_MINOR
    assert splash.BlockSizes.get_default().has_backward_blocks
    with pytest.raises(ValueError, match="contradict use_fused_bwd_kernel"):
        splash.BlockSizes(8, 8, block_q_dq=8, use_fused_bwd_kernel=True)


def test_arguments_that_contradict_one_another():
    causal = splash.CausalMask(SHAPE)
    mask = splash.MultiHeadMask([causal] * HEADS)
    for wrong, match in (
        ({"mask": causal}, r"shape \(37, 50\): it must be \[heads"),
        ({"head_shards": 3}, "head_shards=3 must divide the 4 heads"),
        ({"q_seq_shards": 2}, "q_seq_shards=2 must divide the 37 q"),
        ({"mask_value": 0.0}, "mask_value=0.0: a pair that does not attend"),
        ({"attn_logits_soft_cap": -1.0}, "soft_cap"),
    ):
        given = {"mask": mask, "head_shards": 1, "q_seq_shards": 1} | wrong
        with pytest.raises(ValueError, match=match):
            splash.make_splash_mha(**given)
    with pytest.raises(TypeError, match="dtype int32: it must be bool"):
        make(jnp.ones((2, 3, 3), jnp.int32))
    with pytest.raises(TypeError, match="no mask of all heads"):
        make(ThreeAxes())


class ThreeAxes(splash.Mask):
    """A mask that says it is one of all heads."""

    shape = 4, 8, 8


def test_arrays_that_do_not_fit():
    other = splash.MultiHeadMask([splash.CausalMask(SHAPE), splash.FullMask(SHAPE)] * 2)
    kernel, (q, k, v) = make(other), arrays()
    ids = splash.SegmentIds(jnp.zeros(Q, jnp.int32), jnp.zeros(Q, jnp.int32))
    for args, match in (
        ((q[None], k, v), "map the kernel over a batch with jax.vmap"),
        ((q[:2], k, v), "do not fit the mask of 4 heads"),
        ((q[:, 1:], k, v), "37 queries"),
        ((q, k[:, 1:], v[:, 1:]), "and 50 keys"),
        ((q, k, v, ids), r"shapes \(\(37,\), \(37,\)\)"),
        ((q, k, v, None, jnp.zeros(2)), "one for each of the 4 query heads"),
        ((q, k, v[:1]), "heads"),
    ):
        with pytest.raises(ValueError, match=match):
            kernel(*args)
    with pytest.raises(ValueError, match=r"k has shape .*: it must be \[seq, head_dim"):
        splash.make_splash_mqa_single_device(other)(q, k[None], v[None])


def test_shardings_that_do_not_fit():
    mesh = jax.make_mesh((2, 2), ("h", "q"), axis_types=(AxisType.Auto,) * 2)
    masks = [splash.CausalMask((8, 8)), splash.FullMask((8, 8))]
    kernel = make(splash.MultiHeadMask(masks))
    for spec, match in (
        (P("h", None), "made with head_shards=1: make it with head_shards=2"),
        (P(None, ("h", "q")), "splits q over 4 devices"),
        (P("h"), "has 1 entries"),
    ):
        with pytest.raises(ValueError, match=match):
            kernel.manual_sharding_spec(NamedSharding(mesh, spec))
    same = splash.make_splash_mqa(
        splash.MultiHeadMask(masks[:1] * 4), head_shards=1, q_seq_shards=1
    )
    assert same.manual_sharding_spec(NamedSharding(mesh, P("h", None))).arrays == {}
