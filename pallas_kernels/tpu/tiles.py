"""Default block sizes on TPUs."""

from typing import Any

from pallas_kernels.config import Tile, Tiles


def default_tiles(head_dim: int, head_dim_v: int, dtype: Any) -> Tiles:
    """Block sizes that fit every supported TPU; the caller clips to short sequences."""
    del head_dim, head_dim_v, dtype
    tile = Tile(block_q=512, block_kv=512)
    return Tiles(forward=tile, dq=tile, dkv=tile)
