"""Block sizes when the caller names none."""

from jax.typing import DTypeLike

from pallas_kernels.config import Tile, Tiles, even_block

BLOCK = 128
# What the size of several blocks is a multiple of: that of a vector register.
MULTIPLE = 8


def default_tiles(
    lengths: tuple[int, int], head_dim: int, head_dim_v: int, dtype: DTypeLike
) -> Tiles:
    """128 by 128, measured best or near it on CPUs, or less for shorter sequences."""
    del head_dim, head_dim_v, dtype
    tile = Tile(block_q=BLOCK, block_kv=BLOCK)
    return Tiles(tile, tile, tile).fitted(lengths, _fit)


def _fit(block: int, length: int) -> int:
    """The length itself if it is one block: then nothing is padded or masked."""
    return max(length, 1) if length <= block else even_block(block, length, MULTIPLE)
