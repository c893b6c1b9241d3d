"""Block sizes when the caller names none."""

from jax.typing import DTypeLike

from pallas_kernels.config import Tile, Tiles


def default_tiles(head_dim: int, head_dim_v: int, dtype: DTypeLike) -> Tiles:
    """128 by 128, whatever the arguments: measured best or near it on CPUs."""
    del head_dim, head_dim_v, dtype
    tile = Tile(block_q=128, block_kv=128)
    return Tiles(forward=tile, dq=tile, dkv=tile)
