"""The code of the TPU kernels at its limit: bundles by libtpu, beside those of Splash.

The figures belong to libtpu 0.0.52. Another one may schedule otherwise: then run
``benchmarks/tpu_tiles.py --sweep`` and ``benchmarks/tpu_static.py``.
"""

import json
from importlib import metadata, resources

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)

import sadsl as sa
from lowering.targets import compiling, outside, tpu
from pallas_kernels.config import TileCounts
from pallas_kernels.tpu import tiles

N, HEADS, DIM = 8192, 4, 128
COUNTED = json.loads(
    resources.files("pallas_kernels.tpu").joinpath("bundles.json").read_text()
)


def kernels(fn, args, chip):
    found = outside.compile_outside(compiling.lower_for(fn, args, chip), chip)
    return {k.name: k for k in tpu.kernels_of(found.files)}


def ours(spec, tile, chip="tpu-v6e", **given):
    config = sa.KernelConfig(block_q=tile[0], block_kv=tile[1])
    x = jax.ShapeDtypeStruct((1, N, HEADS, DIM), jnp.bfloat16)

    def loss(arrays, ids):
        operands = dict.fromkeys(given, ids)
        out = sa.attention(*arrays, spec, impl="tpu", config=config, **operands)
        return jnp.sum(out.astype(jnp.float32))

    ids = jax.ShapeDtypeStruct((1, N), jnp.int32)
    found = kernels(jax.value_and_grad(loss), ((x, x, x), ids), chip)
    return [
        next(k for name, k in found.items() if kernel in name)
        for kernel in ("sadsl_forward", "sadsl_backward")
    ]


def theirs(tile, chip="tpu-v6e"):
    q, kv = tile
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((N, N))] * HEADS)
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    x = jax.ShapeDtypeStruct((HEADS, N, DIM), jnp.bfloat16)
    loss = jax.value_and_grad(lambda a: jnp.sum(kernel(*a).astype(jnp.float32)))
    found = kernels(loss, ((x, x, x),), chip)
    return [
        next(k for name, k in found.items() if kernel in name)
        for kernel in ("splash_mha_fwd", "splash_mha_dkv")
    ]


def spans(kernel):
    return [region.bundles for region in kernel.regions]


needs_libtpu = pytest.mark.skipif(
    metadata.version("libtpu") != "0.0.52", reason="figures of libtpu 0.0.52"
)


@needs_libtpu
@pytest.mark.slow
class TestAgainstSplash:
    def test_forward(self):
        mine, _ = ours(sa.causal(), (512, 1024))
        (peer,) = spans(theirs((512, 1024))[0])
        full, partial, *_ = spans(mine)
        assert full <= 0.82 * peer
        assert partial <= 0.97 * peer

    def test_backward_at_the_best_tiles(self):
        _, mine = ours(sa.causal(), (1024, 1024))
        peers = [
            spans(theirs(tile)[1])[0] / (tile[0] * tile[1])
            for tile in ((512, 512), (1024, 1024))
        ]
        full, partial, *_ = spans(mine)
        assert full / 1024**2 <= 0.75 * min(peers)
        assert partial <= 1.1 * full


@needs_libtpu
@pytest.mark.slow
def test_tiles_have_the_bundles_of_the_table():
    for kernel, name in zip(
        ours(sa.causal(), (512, 512)), ("forward", "backward"), strict=True
    ):
        found = [loop.bundles for loop in kernel.loops[:2]]
        # The same program varies by up to 3 percent between compilations.
        counted = COUNTED["tpu-v6e"]["128"]["512x512"][name]
        assert found == pytest.approx(counted, rel=0.03)


@needs_libtpu
@pytest.mark.slow
def test_documents_cost_little_more_than_causal():
    plain = ours(sa.causal(), (512, 512))
    documents = ours(
        sa.causal() & sa.segments(), (512, 512),
        q_segment_ids=True, kv_segment_ids=True,
    )  # fmt: skip
    for one, other in zip(plain, documents, strict=True):
        assert spans(other)[1] <= 1.15 * spans(one)[1]


class TestDefaultTiles:
    def test_the_table_is_whole(self):
        for by_dim in COUNTED.values():
            assert set(by_dim) == {"64", "128"}
            for by_tile in by_dim.values():
                assert len(by_tile) == 5
                for of_kernel in by_tile.values():
                    assert set(of_kernel) == {"forward", "backward"}
                    assert all(len(x) == 2 and min(x) > 300 for x in of_kernel.values())

    def chosen(self, full_share, length=8192, dtype=jnp.bfloat16):
        """The default tiles if ``full_share(block)`` of all blocks are visited."""

        def counts(block_q, block_kv):
            rows, columns = -(-length // block_q), -(-length // block_kv)
            visited = int(rows * columns * full_share(max(block_q, block_kv)))
            return TileCounts(visited, 0, rows, columns)

        with compiling.abstract_mesh("tpu-v6e"):
            return tiles.default_tiles((length, length), 128, 128, dtype, counts)

    def test_large_tiles_where_all_pairs_attend(self):
        found = self.chosen(lambda _: 1)
        assert (found.forward.block_q, found.forward.block_kv) == (1024, 1024)
        assert found.dq == found.dkv

    def test_small_tiles_where_large_ones_are_half_empty(self):
        found = self.chosen(lambda block: block**2 / 1024**2)
        assert (found.forward.block_q, found.dkv.block_kv) == (256, 256)

    def test_only_what_was_counted_has_a_choice(self):
        found = self.chosen(lambda _: 1, dtype=jnp.float32)
        assert (found.forward.block_q, found.forward.block_kv) == (512, 512)

    def test_short_sequences_have_no_padding_to_large_tiles(self):
        found = self.chosen(lambda _: 1, length=700)
        assert found.forward.block_q == 768
