"""Block sizes, warps and stages that fit the registers and shared memory of a GPU."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import Tile, Tiles

# The tensor cores take no smaller matrix.
SMALLEST = 16


def power_of_two(size: int) -> int:
    """The smallest power of two that Triton multiplies and that holds ``size``."""
    return max(SMALLEST, 1 << max(size - 1, 0).bit_length())


def _tiles(*sizes: tuple[int, int, int, int]) -> Tiles:
    names = ("block_q", "block_kv", "num_warps", "num_stages")
    forward, dq, dkv = (Tile(**dict(zip(names, x, strict=True))) for x in sizes)
    return Tiles(forward, dq, dkv)


# By the largest head size: block_q, block_kv, warps, stages of forward, dq and dkv.
HALF = (
    (64, _tiles((128, 128, 8, 2), (128, 128, 8, 2), (64, 128, 8, 2))),
    (128, _tiles((128, 64, 8, 4), (128, 64, 8, 4), (32, 128, 8, 2))),
    (256, _tiles((128, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2))),
    (math.inf, _tiles((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1))),
)
# Full-precision products run outside of the tensor cores, from registers.
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
) -> Tiles:
    """The tiles of a head size and input dtype, or less for shorter sequences.

    Chosen by the registers of the code compiled for sm_90: up to head size 256 in 16
    bits and 128 in 32 bits the kernels of causal attention spill none. Shared memory
    fits that of an A100 too.
    """
    size = power_of_two(max(head_dim, head_dim_v))
    table = HALF if jnp.dtype(dtype).itemsize <= 2 else SINGLE
    tiles = next(tiles for limit, tiles in table if size <= limit)
    return tiles.fitted(lengths, lambda block, n: min(block, power_of_two(n)))


def check(mask: BlockMask, tile: Tile) -> None:
    """Refuses sizes that Triton has no code for."""
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
