"""Calls on arrays that are sharded over devices, by ``shard_map`` or by jit."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sadsl as sa
from lowering.targets import chips, compiling
from sadsl.selections import kmeans, mass, topk, vertical_slash

BATCH, LENGTH, HEADS, DIM = 4, 40, 4, 8
AXES = (AxisType.Auto,) * 2
ARRAYS = P("batch", None, "heads", None)
DOCUMENTS = np.repeat(np.arange(5, dtype=np.int32), 8)[None].repeat(BATCH, 0)
PREFIX = sa.where(lambda q, k: (k <= q) | (k < sa.operand("prefix")))


class Case(NamedTuple):
    """A spec, its operands and how each is laid out over the mesh."""

    spec: Any
    operands: Mapping[str, np.ndarray] = MappingProxyType({})
    over: Mapping[str, P] = MappingProxyType({})


IDS = {"q_segment_ids": DOCUMENTS, "kv_segment_ids": DOCUMENTS}
CENTROIDS = np.random.default_rng(1).normal(size=(HEADS, 3, DIM)).astype(np.float32)
BIAS = np.random.default_rng(2).normal(size=(BATCH, HEADS, LENGTH)).astype(np.float32)
CASES = {
    "window": Case(sa.causal() & sa.window(9)),
    "segments": Case(sa.causal() & sa.segments(), IDS, dict.fromkeys(IDS, P("batch"))),
    "operand": Case(
        PREFIX, {"prefix": np.array([1, 9, 20, 33], np.int32)}, {"prefix": P("batch")}
    ),
    "topk": Case(sa.causal() & (sa.window(8) | topk(2, block=8, block_q=8))),
    "kmeans": Case(
        sa.causal() & kmeans(3), {"centroids": CENTROIDS}, {"centroids": P("heads")}
    ),
    "slashes": Case(vertical_slash(4, 4, last=5)),
    "mass": Case(mass(0.4, block=8, block_q=8)),
    "learned bias": Case(
        sa.softmax(sa.causal(), bias=sa.key_bias("bias")),
        {"bias": BIAS},
        {"bias": P("batch", "heads")},
    ),
    "linear": Case(sa.linear("elu1")),
    "joint": Case(sa.joint(sa.causal(), sa.softmax(sa.window(4)), overlap="count")),
}
QUICK = ("window", "segments", "topk", "linear")


def arrays():
    rng = np.random.default_rng(0)
    shape = BATCH, LENGTH, HEADS, DIM
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))


def with_gradient(spec, **options):
    """Output and gradients of a call on one device, or on a shard."""

    def run(q, k, v, operands):
        def call(q, k, v):
            return sa.attention(q, k, v, spec, operands=operands or None, **options)

        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(jnp.cos(out))

    return run


def sharded(run, mesh, over, **options):
    specs = ARRAYS, ARRAYS, ARRAYS, dict(over)
    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=ARRAYS, **options)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
@pytest.mark.usefixtures("quick")
def test_shards_of_batch_and_heads_under_the_check(name):
    spec, operands, over = CASES[name]
    run = with_gradient(spec, config=sa.KernelConfig(block_q=8, block_kv=8))
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=AXES)
    wanted = jax.jit(run)(*arrays(), dict(operands))
    found = sharded(run, mesh, over)(*arrays(), dict(operands))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_dropout_and_a_replicated_axis_under_the_check():
    key = jax.random.key(3)
    run = with_gradient(sa.causal(), dropout_rate=0.3, dropout_key=key)
    mesh = jax.make_mesh((1, 4), ("batch", "heads"), axis_types=AXES)
    only_batch = P("batch")
    f = jax.shard_map(
        lambda *x: run(*x, {}), mesh=mesh, in_specs=only_batch, out_specs=only_batch
    )
    for a, b in zip(jax.jit(f)(*arrays()), run(*arrays(), {}), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [n if n == "segments" else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
@pytest.mark.parametrize(("impl", "target"), [("tpu", "tpu-v5e"), ("triton", "h100")])
def test_kernels_lower_under_the_check(name, impl, target):
    spec, operands, over = CASES[name]
    chip = chips.find(target)
    with compiling.abstract_mesh(target):
        device = jax.sharding.get_abstract_mesh().abstract_device
    names = "batch", "heads"
    mesh = AbstractMesh((2, 2), names, axis_types=AXES, abstract_device=device)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, 64), jnp.float32)
    given = {
        name: jax.ShapeDtypeStruct(
            (*a.shape[:-1], 64) if name == "centroids" else a.shape, a.dtype
        )
        for name, a in operands.items()
    }
    run = with_gradient(spec, impl=impl)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        traced = sharded(run, mesh, over).trace(x, x, x, given)
        program = traced.lower(lowering_platforms=(chip.platform,))
    call = "tpu_custom_call" if impl == "tpu" else "__gpu$xla.gpu.triton"
    assert program.as_text().count(call) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("topk by key", "mass") else pytest.param(n, marks=pytest.mark.slow)
        for n in ("topk by key", "topk", "mass", "slashes", "segments")
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_sharded_sequence(name):
    by_key = Case(topk(2, block=1, block_q=1))
    spec, operands, _ = by_key if name == "topk by key" else CASES[name]
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
    run = jax.jit(with_gradient(spec))
    wanted = run(*arrays(), dict(operands))
    place = NamedSharding(mesh, P(None, "seq"))
    found = run(*(jax.device_put(x, place) for x in arrays()), dict(operands))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
