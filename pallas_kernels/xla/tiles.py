"""Default block sizes on CPUs."""

from jax.typing import DTypeLike

from pallas_kernels.config import Tile, TileCounter, Tiles, even_block

BLOCK = 128
# If a sequence has several blocks, their size is a multiple of this (vector registers).
MULTIPLE = 8


def default_tiles(
    lengths: tuple[int, int],
    head_dim: int,
    head_dim_v: int,
    dtype: DTypeLike,
    counts: TileCounter | None = None,
) -> Tiles:
    """128 by 128, smaller for shorter sequences; measured as best or nearly on CPUs."""
    del head_dim, head_dim_v, dtype, counts
    tile = Tile(block_q=BLOCK, block_kv=BLOCK)
    return Tiles(tile, tile, tile).fitted(lengths, _fit)


def _fit(block: int, length: int) -> int:
    """The length itself if it fits one block, which then needs no padding or mask."""
    return max(length, 1) if length <= block else even_block(block, length, MULTIPLE)
