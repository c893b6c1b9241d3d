"""Default block sizes, warps and stages of the Triton kernels."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import Tile, TileCounter, Tiles

# The smallest matrix size of the tensor cores.
SMALLEST = 16


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` and ``SMALLEST``."""
    return max(SMALLEST, 1 << max(size - 1, 0).bit_length())


def _tiles(*sizes: tuple[int, int, int, int]) -> Tiles:
    names = ("block_q", "block_kv", "num_warps", "num_stages")
    forward, dq, dkv = (Tile(**dict(zip(names, x, strict=True))) for x in sizes)
    return Tiles(forward, dq, dkv)


# 16-bit inputs: (largest head size, tiles of forward, dq and dkv), each of which is
# (block_q, block_kv, num_warps, num_stages).
HALF = (
    (64, _tiles((128, 128, 8, 2), (128, 128, 8, 2), (64, 128, 8, 2))),
    (128, _tiles((128, 64, 8, 4), (128, 64, 8, 4), (32, 128, 8, 2))),
    (256, _tiles((128, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2))),
    (math.inf, _tiles((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1))),
)
# 32-bit inputs: full-precision products run outside of the tensor cores.
SINGLE = (
    (64, _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2))),
    (128, _tiles((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2))),
    (256, _tiles((32, 32, 8, 2), (32, 16, 8, 2), (16, 32, 8, 1))),
    (math.inf, _tiles((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1))),
)


def default_tiles(
    lengths: tuple[int, int],
    head_dim: int,
    head_dim_v: int,
    dtype: jax.typing.DTypeLike,
    counts: TileCounter | None = None,
) -> Tiles:
    """The tiles for a head size and input dtype, smaller for shorter sequences.

    They are chosen by the registers of the code compiled for sm_90. The kernels of
    causal attention spill no register up to head size 256 in 16 bits and 128 in 32
    bits. Their shared memory also fits an A100.
    """
    del counts
    size = power_of_two(max(head_dim, head_dim_v))
    table = HALF if jnp.dtype(dtype).itemsize <= 2 else SINGLE
    tiles = next(tiles for limit, tiles in table if size <= limit)
    return tiles.fitted(lengths, lambda block, n: min(block, power_of_two(n)))


def check(mask: BlockMask, tile: Tile) -> None:
    """Checks the sizes of a kernel.

    Raises:
      ValueError: a block size or number of warps that Triton does not support.
    """
    sizes = {"block_q": mask.block_q, "block_kv": mask.block_kv}
    for name, value in sizes.items():
        if value != power_of_two(value):
            raise ValueError(
                f"{name}={value}: impl='triton' needs a power of two of at least "
                f"{SMALLEST}, such as {power_of_two(value)}"
            )
    if tile.num_warps & (tile.num_warps - 1):
        raise ValueError(
            f"num_warps={tile.num_warps}: impl='triton' needs a power of two, such "
            "as 4 or 8"
        )
