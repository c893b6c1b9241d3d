"""Predicted costs equal what the kernels execute, and sums over the blocks."""

from contextlib import ExitStack
from functools import cache
from unittest import mock

import counters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import pipeline
from lowering.cost import cost, rooflines
from lowering.targets.chips import TARGETS
from pallas_kernels.block_mask import EMPTY, FULL, PARTIAL, expand
from pallas_kernels.config import Tile, Tiles
from pallas_kernels.xla import walks as xla_plan

TILES = Tiles(
    forward=Tile(block_q=32, block_kv=16),
    dq=Tile(block_q=16, block_kv=32),
    dkv=Tile(block_q=16, block_kv=64),
)
# Spec, queries x keys, query heads / key heads.
CALLS = {
    "window": ("causal() & (window(40) | sinks(3))", (257, 257), (1, 1)),
    "heads, grouped": (
        "per_head(causal(), (causal() & strided(7)) - queries(20, 90))",
        (130, 130),
        (4, 2),
    ),
    "arranged": ("strided(16) - keys(0, 9)", (256, 256), (1, 1)),
}


def sizes_of(inputs, impl):
    q, k, v = inputs
    return cost.CallSizes(
        batch=q.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        itemsize=q.dtype.itemsize,
        impl=impl,
    )


@pytest.fixture
def quick(quick_compilation):
    """Every impl without optimizations here: they change nothing that is counted."""
    jax.config.update("jax_disable_most_optimizations", True)


# By default each call on one backend, and the window on all.
NEAR = {("heads, grouped", "triton"), ("arranged", "xla")}
COUNTED = [
    pytest.param(
        name, impl,
        marks=[] if name == "window" or (name, impl) in NEAR else pytest.mark.slow,
    )
    for name in CALLS
    for impl in ("tpu", "triton", "xla")
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "impl"), COUNTED)
def test_tiles_and_flops_are_those_that_the_kernels_execute(name, impl):
    text, lengths, heads = CALLS[name]
    batch, dims = 2 if name == "arranged" else 1, (16, 24)
    stages = pipeline.run(sa.parse(text).node, pipeline.Problem(*lengths, heads[0]))
    if name == "arranged":
        stages = pipeline.arrange(stages, 16, 16)
        assert stages.layouts is not None
    problem = stages.planned.problem
    lengths = problem.q_seq_len, problem.kv_seq_len
    rng = np.random.default_rng(0)
    shapes = [(batch, heads[i > 0], lengths[i > 0], dims[i > 1]) for i in range(3)]
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    found, masks = counters.run(stages, inputs, TILES, impl)
    of = cost.cost(masks, sizes_of(inputs, impl))
    kernels = [of.forward, *of.backward[:-1]]
    for work in kernels:
        predicted = work.num_full, work.num_partial, work.num_padded, work.flops
        assert found.of(work.name) == predicted, work.name
    assert {kernel for kernel, _ in found.counts} == {work.name for work in kernels}
    if impl == "tpu":
        row_bytes = {"forward": 4 * 40 + 4, "dq": 4 * 56 + 8, "dkv": 4 * 80}
        for mask, work in zip(masks, kernels, strict=True):
            forward = mask.by == "q"
            rows = batch * heads[not forward] * mask.num_rows
            rows *= mask.block_q if forward else mask.block_kv
            streamed = work.bytes - rows * row_bytes[work.name]
            assert found.streamed(work.name) == streamed


def masks_of(spec, n, num_heads, tiles=TILES):
    stages = pipeline.run(spec.node, pipeline.Problem(n, n, num_heads))
    return pipeline.masks(stages, tiles)


@cache
def tiles():
    def square(a, b):
        tile = Tile(block_q=a, block_kv=b)
        return Tiles(forward=tile, dq=tile, dkv=Tile(block_q=b, block_kv=a))

    return st.builds(square, strategies.BLOCKS, strategies.BLOCKS)


@settings(max_examples=few(40))
@given(strategies.with_heads(), strategies.SIZES, tiles())
def test_blocks_and_pairs_are_counted_as_one_sees_them(spec, n, tiles):
    masks = masks_of(spec, n, 6, tiles)
    for mask in masks:
        counted, kinds = cost.blocks(mask), expand(mask)
        for counts, kind in (
            (counted.full, FULL), (counted.partial, PARTIAL), (counted.empty, EMPTY),
        ):  # fmt: skip
            assert counts == tuple((kinds == kind).sum(axis=(1, 2)))
        of_heads = (kinds[np.asarray(mask.map_of_head)] == FULL).sum()
        assert counted.over_heads(counted.full) == of_heads
        assert counted.num_runs == len(mask.run_start)
    plan = sa.plan(
        spec, n, block_q=tiles.forward.block_q, block_kv=tiles.forward.block_kv,
        num_heads=6,
    )  # fmt: skip
    dense = spec.dense(n, num_heads=6)
    pairs = np.array(plan.pairs_of_maps)[np.asarray(plan.mask.map_of_head)]
    np.testing.assert_array_equal(pairs, dense.sum(axis=(1, 2)))
    sizes = sizes_of([np.zeros((3, 6, n, 8), np.float16)] * 3, "tpu")
    forward = cost.cost(masks, sizes).forward
    area = tiles.forward.block_q * tiles.forward.block_kv * forward.num_tiles
    waste = cost.padding_waste(3 * int(pairs.sum()), forward, plan.mask)
    assert waste == (1 - 3 * dense.sum() / area if area else 0)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_bytes_add_up_block_by_block(num_kv_heads):
    """Every row of a head reads its own block, and each block that it visits, once."""
    spec, n, d, dv, item = sa.parse(CALLS["heads, grouped"][0]), 130, 8, 12, 2
    masks = masks_of(spec, n, 4)
    arrays = [np.zeros((3, h, n, x), np.float16) for h, x in
              ((4, d), (num_kv_heads, d), (num_kv_heads, dv))]  # fmt: skip
    of = cost.cost(masks, sizes_of(arrays, "tpu"))

    def total(mask, head_rows, own, other):
        kinds = expand(mask)[np.asarray(mask.map_of_head)]
        own_block, other_block = mask.block_q, mask.block_kv
        if mask.by == "kv":
            own_block, other_block = other_block, own_block
        moved = head_rows * kinds.shape[1] * own_block * own
        for row in kinds.reshape(-1, kinds.shape[2]):
            moved += (row != EMPTY).sum() * other_block * other
        return 3 * moved

    kv, statistics = (d + dv) * item, 8
    # At the least, each array once: all keys are visited here, and all queries.
    queries, keys = 3 * 4 * 160, 3 * num_kv_heads * 144
    assert of.forward.least_bytes == queries * (kv + 4) + keys * kv
    assert of.forward.bytes == total(masks.forward, 4, kv + 4, kv)
    backward, delta = of.backward
    # One segment: k, v, dk, dv and dq once.
    once = 3 * 4 * masks.dkv.num_columns * masks.dkv.block_q * d * item
    assert backward.bytes == once + total(
        masks.dkv, num_kv_heads, 2 * kv, kv + statistics
    )
    assert delta.bytes == 3 * 4 * n * (2 * dv * item + 4)
    assert of.flops(backward=True) == backward.flops
    arrays = [x.astype(np.float32) for x in arrays]
    of = cost.cost(masks, sizes_of(arrays, "triton"))
    dq, dkv, delta = of.backward
    d, dv, item = (1 << (x - 1).bit_length() for x in (max(d, 16), max(dv, 16), 4))
    kv = (d + dv) * item
    assert dq.bytes == total(masks.dq, 4, (2 * d + dv) * item + statistics, kv)
    assert dkv.bytes == total(masks.dkv, num_kv_heads, 2 * kv, kv + statistics)
    assert of.flops(backward=True) == dq.flops + dkv.flops


def test_triton_multiplies_powers_of_two():
    arrays = [np.zeros((1, 1, 64, x), np.float16) for x in (40, 40, 8)]
    masks = masks_of(sa.full(), 64, 1)
    flops = cost.cost(masks, sizes_of(arrays, "triton")).flops()
    assert flops == 2 * 64 * 64 * (64 + 16)


@settings(max_examples=few(30))
@given(strategies.with_heads(), strategies.BLOCKS)
def test_padding_of_xla_is_that_of_its_lists(spec, block):
    """With few keys to a row and to a chunk, so that all kinds of rows come up."""
    tile = Tile(block_q=block, block_kv=8)
    masks = masks_of(spec, 130, 6, Tiles(forward=tile, dq=tile, dkv=tile))
    arrays = [np.zeros((1, 6, 1, 8), np.float32)] * 3
    with ExitStack() as stack:
        for module in (cost, xla_plan):
            stack.enter_context(mock.patch.object(module, "SHORT", 64))
            stack.enter_context(mock.patch.object(module, "CHUNK", 32))
        walks = xla_plan.plan(masks.forward).walks
        of = cost.cost(masks, sizes_of(arrays, "xla"))
    slots = np.zeros(len(walks), int)
    for m, walk in enumerate(walks):
        slots[m] += sum(short.block.size for short in walk.short)
        if walk.long is not None:
            for chunks in (walk.long.full, walk.long.partial):
                count = (chunks.end - chunks.begin).sum()
                slots[m] += count * chunks.block.shape[1]
    assert of.forward.num_tiles == slots[np.asarray(masks.forward.map_of_head)].sum()


def test_dense_and_causal():
    masks = masks_of(sa.parse(CALLS["heads, grouped"][0]), 256, 4)
    arrays = [np.zeros((1, 4, 256, 8), np.float16)] * 3
    sizes = sizes_of(arrays, "tpu")
    assert cost.cost(cost.dense(masks), sizes).flops() == 2 * 4 * 256 * 256 * 16
    for offset in (0, 100):
        shifted = sa.parse(f"where(lambda q, k: k <= q + {offset})")
        expected = cost.cost(masks_of(shifted, 256, 4), sizes)
        assert cost.cost(cost.dense_causal(masks, offset), sizes) == expected


def test_every_target_has_a_peak():
    assert set(rooflines.PEAKS) == set(TARGETS)
    for peak in rooflines.PEAKS.values():
        assert peak.single < peak.half


def test_times_are_those_of_the_roofline():
    peak = rooflines.PEAKS["h100"]
    busy = cost.Work(name="forward", flops=10**12, bytes=10**6, least_bytes=10**6)
    # Of these bytes a GPU finds half in its cache, and a TPU none.
    moving = cost.Work(name="delta", flops=0, bytes=2 * 10**9, least_bytes=10**9)
    of = cost.Cost(forward=busy, backward=(busy, moving), exact_products=False)
    assert rooflines.predict(of, "h100") == rooflines.Time(1e12 / peak.half, "FLOPs")
    backward = rooflines.predict(of, "h100", backward=True)
    assert backward.seconds == 1e12 / peak.half + 1e9 / peak.bandwidth
    exact = cost.Cost(forward=busy, backward=(), exact_products=True)
    assert rooflines.predict(exact, "h100").seconds == 1e12 / peak.single
    ordered = cost.Cost(
        forward=moving, backward=(), exact_products=False, permutation_bytes=10**9
    )
    time = rooflines.predict(ordered, "h100")
    assert time == rooflines.Time(2 * 1e9 / peak.bandwidth, "bytes")
    assert (ordered.bytes(), ordered.least_bytes()) == (3 * 10**9, 2 * 10**9)
    tpu = rooflines.predict(ordered, "tpu-v5e").seconds
    assert tpu == 3 * 1e9 / rooflines.PEAKS["tpu-v5e"].bandwidth
    assert of.intensity() == 10**6


def test_a_cpu_has_no_public_peak():
    of = cost.Cost(
        forward=cost.Work(name="forward", bytes=1, least_bytes=1),
        backward=(),
        exact_products=True,
    )
    with pytest.raises(ValueError, match=r"target='cpu' has no public peak.*tpu-v5e"):
        rooflines.predict(of, "cpu")


def test_a_permutation_reads_and_writes_what_it_moves():
    arrays = [
        np.zeros(s, np.float16) for s in ((2, 6, 0, 8), (2, 3, 0, 8), (2, 3, 0, 16))
    ]
    moved = cost.permutation_bytes(sizes_of(arrays, "tpu"), (100, 50), (112, 64))
    queries, keys = 6 * (100 + 112), 3 * (50 + 64)
    assert moved == 2 * (2 * (queries + keys) * (8 + 16) + 4 * queries)


@pytest.mark.parametrize(
    ("n", "window", "megabytes"),
    [(8192, None, 47), (65536, None, 3003), (65536, 4096, 589), (2**20, 4096, 9719)],
)
def test_traffic_of_the_tpu_backward(n, window, megabytes):
    """A head of 128 channels, bf16, tiles of 512 x 512, segments of 8192 queries."""
    spec = sa.causal() if window is None else sa.causal() & sa.window(window)
    x = jax.ShapeDtypeStruct((1, n, 1, 128), jnp.bfloat16)
    config = sa.KernelConfig(block_q=512, block_kv=512)
    low = sa.lower(spec, x, x, x, target="tpu-v6e", config=config)
    sizes = cost.CallSizes(
        batch=1, num_q_heads=1, num_kv_heads=1, head_dim=128, head_dim_v=128,
        itemsize=2, impl="tpu",
    )  # fmt: skip
    backward, _ = cost.cost(low.masks, sizes).backward
    assert backward.bytes / 1e6 == pytest.approx(megabytes, rel=0.01)
