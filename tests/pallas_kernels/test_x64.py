"""Kernels with ``jax_enable_x64``: untyped literals do not become 64-bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from kernel_cases import Case, Pattern

import sadsl as sa
from lowering.targets import compiling
from pallas_kernels import dispatch
from pallas_kernels.config import Tile
from pallas_kernels.loops import repeat
from pallas_kernels.precision import wide, widened

INTERPRETED = {"xla": {}, "tpu": {"interpret": True}, "triton": {"interpret": True}}
FIRST = Case(pattern=Pattern("window"), q_len=30, kv_len=40, batch=1, kv_heads=1)
KERNEL = {"tpu": "tpu_custom_call", "triton": "__gpu$xla.gpu.triton"}
TILE = Tile(block_q=128, block_kv=128)
LARGE = replace(
    FIRST,
    pattern=Pattern("two maps", maps=2),
    q_len=200,
    kv_len=300,
    dim=64,
    dim_v=64,
    forward=TILE,
    dkv=TILE,
)


@pytest.fixture(autouse=True)
def with_64_bits():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "case",
    [FIRST, *(pytest.param(x, marks=pytest.mark.slow) for x in kernel_cases.table())],
    ids=str,
)
@pytest.mark.parametrize("impl", INTERPRETED)
def test_table(impl, case):
    case.check(impl, **INTERPRETED[impl])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("impl", "chip"),
    [("tpu", "tpu-v5e"), ("tpu", "tpu-v6e"), ("triton", "h100")],
)
def test_lowers(impl, chip):
    masks, call, vectors = LARGE.masks(), LARGE.call(), LARGE.vectors()

    def loss(inputs):
        out = dispatch.attend(inputs, vectors, masks, call, impl=impl)
        return jnp.sum(out.o.astype(jnp.float32)) + jnp.sum(out.lse)

    inputs, *_ = LARGE.arrays()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), inputs)
    run = compiling.compile_for if impl == "tpu" else compiling.lower_for
    text = run(jax.value_and_grad(loss), (like,), chip).as_text()
    assert text.count(KERNEL[impl]) >= 3, "forward, dq and dkv"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["tpu-v5e", "tpu-v6e"])
def test_linear_attention_compiles(chip):
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    spec = sa.linear(decay=0.9, map=sa.causal() & sa.segments())

    def loss(arrays, ids):
        given = {"q_segment_ids": ids, "kv_segment_ids": ids}
        out = sa.attention(*arrays, spec, impl="tpu", **given)
        return jnp.sum(out.astype(jnp.float32))

    made = compiling.compile_for(jax.value_and_grad(loss), ((x, x, x), ids), chip)
    assert made.as_text().count(KERNEL["tpu"]) >= 2


def test_widened():
    for dtype in ("bfloat16", "float16", "float32"):
        assert wide(jnp.dtype(dtype)) == jnp.float32
    assert wide(jnp.dtype("float64")) == jnp.float64
    assert widened(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    assert widened(jnp.ones(3, jnp.float64)).dtype == jnp.float64


def test_repeat_counts_in_32_bits():
    seen = []

    def step(i, total):
        seen.append(i.dtype)
        return total + i

    assert repeat(5, step, jnp.int32(0)) == 10
    assert set(seen) == {np.dtype("int32")}
