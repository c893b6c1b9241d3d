"""Default block sizes on TPUs."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from pallas_kernels.config import Tile, Tiles, even_block
from pallas_kernels.tpu.runs import LANES


def default_tiles(
    lengths: tuple[int, int], head_dim: int, head_dim_v: int, dtype: Any
) -> Tiles:
    """Block sizes that fit every supported TPU, smaller for shorter sequences."""
    # A product in full f32 takes six passes: a wide one unrolls into too much code.
    wide = max(head_dim, head_dim_v) > 128 and jnp.dtype(dtype) != jnp.bfloat16
    block = 256 if wide else 512
    tile = Tile(block_q=block, block_kv=block)
    # Both blocks are multiples of LANES: keys lie along the lanes in the forward and dq
    # kernels, queries in the dkv kernel.
    return Tiles(tile, tile, tile).fitted(lengths, partial(even_block, multiple=LANES))
