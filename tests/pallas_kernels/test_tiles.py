"""Default block sizes depend on the lengths of the call, on every backend."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from pallas_kernels import linear, tpu, triton, xla
from pallas_kernels.config import KernelConfig
from pallas_kernels.triton.tiles import power_of_two

BACKENDS = {"xla": xla, "tpu": tpu, "triton": triton}
LEAST = {"xla": 1, "tpu": 128, "triton": 16}
LENGTH = st.one_of(st.integers(1, 600), st.integers(1, 1 << 20))
LARGEST = 1 << 30


@pytest.mark.parametrize("impl", BACKENDS)
@settings(max_examples=few(30))
@given(
    q=LENGTH,
    kv=LENGTH,
    dim=st.sampled_from([16, 64, 128, 256]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_blocks_follow_both_lengths(impl, q, kv, dim, dtype):
    default = BACKENDS[impl].default_tiles
    found = default((q, kv), dim, dim, dtype)
    most = default((LARGEST, LARGEST), dim, dim, dtype)
    for name in ("forward", "dq", "dkv"):
        tile, widest = getattr(found, name), getattr(most, name)
        sizes = (tile.block_q, widest.block_q, q), (tile.block_kv, widest.block_kv, kv)
        for block, limit, length in sizes:
            assert LEAST[impl] <= block <= limit
            # A block is less than twice its sequence, so padding is bounded.
            assert block < 2 * max(length, LEAST[impl])
            if impl == "xla":
                blocks = -(-length // block)
                assert blocks == -(-length // limit)
                assert blocks * block - length < 8 * blocks
            elif impl == "tpu":
                assert block % 128 == 0
            else:
                assert block == power_of_two(block)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, 100, 5000])
def test_chunks_follow_the_length(impl, length):
    sizes = linear.LinearSizes(length, 64, 64)
    call = linear.default_call(
        linear.Recurrence(), impl, sizes, jnp.float32, KernelConfig()
    )
    assert call.chunk < 2 * max(length, LEAST[impl])
    assert call.chunk % LEAST[impl] == 0


def flops(f, *shapes):
    compiled = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    return compiled.compile().cost_analysis()["flops"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(1, 1, 2048), (4096, 8, 8), (1, 130, 130), (3, 32, 32), (1, 1, 1)],
)
def test_work_is_that_of_dense_attention(batch, queries, keys):
    q, k = ((batch, n, 8, 64) for n in (queries, keys))

    def ours(q, k, v):
        return sa.attention(q, k, v, sa.causal(), q_offset=keys - queries, impl="xla")

    def theirs(q, k, v):
        causal = queries == keys
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def gradient(f):
        def run(q, k, v):
            out, pull = jax.vjp(f, q, k, v)
            return out, pull(jnp.cos(out))

        return run

    for own, other in ((ours, theirs), (gradient(ours), gradient(theirs))):
        assert flops(own, q, k, k) < 1.5 * flops(other, q, k, k) + 30_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_tiles_of_triton_resolve(dim, dtype):
    tiles = triton.default_tiles((4096, 4096), dim, dim, dtype)
    assert KernelConfig().resolve(tiles) == tiles
    assert KernelConfig(block_q=16).resolve(tiles).dkv.block_q == 16


def test_a_chunk_that_is_too_long():
    sizes, config = linear.LinearSizes(64, 64, 64), KernelConfig(block_kv=1024)
    with pytest.raises(ValueError, match=r"1024 positions.*at most 512"):
        linear.default_call(linear.Recurrence(), "xla", sizes, "float32", config)


def test_a_chunk_that_cannot_be_halved():
    sizes = linear.LinearSizes(64, 64, 64, by_channel=True)
    config = KernelConfig(block_kv=48)
    with pytest.raises(ValueError, match=r"48 positions.*power of two.*give 64"):
        linear.default_call(linear.Recurrence(), "xla", sizes, "float32", config)
