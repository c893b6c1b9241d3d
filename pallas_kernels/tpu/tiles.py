"""Default block sizes on TPUs."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.config import Tile, Tiles


def default_tiles(head_dim: int, head_dim_v: int, dtype: Any) -> Tiles:
    """Block sizes that fit every supported TPU; the caller clips to short sequences."""
    # Products in full f32 take six passes each: wide ones unroll into too much code.
    wide = max(head_dim, head_dim_v) > 128 and jnp.dtype(dtype) != jnp.bfloat16
    block = 256 if wide else 512
    tile = Tile(block_q=block, block_kv=block)
    return Tiles(forward=tile, dq=tile, dkv=tile)
