"""Block sizes, warps and stages that fit the registers and shared memory of a GPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import Tile, Tiles

# The tensor cores take no smaller matrix.
SMALLEST = 16


def power_of_two(size: int) -> int:
    """The smallest power of two that Triton multiplies and that holds ``size``."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _tile(block_q: int, block_kv: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(
        block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=num_stages
    )


def default_tiles(head_dim: int, head_dim_v: int, dtype: jax.typing.DTypeLike) -> Tiles:
    """The tiles of a head size and input dtype; none of them spills for sm_90."""
    size = power_of_two(max(head_dim, head_dim_v))
    if jnp.dtype(dtype).itemsize > 2:
        return _float32_tiles(size)
    if size <= 64:
        return Tiles(
            forward=_tile(128, 128, 8, 2),
            dq=_tile(128, 128, 8, 2),
            dkv=_tile(64, 128, 8, 2),
        )
    if size <= 128:
        return Tiles(
            forward=_tile(128, 64, 8, 4),
            dq=_tile(128, 64, 8, 4),
            dkv=_tile(32, 128, 8, 2),
        )
    return Tiles(
        forward=_tile(64, 32, 8, 2), dq=_tile(64, 32, 8, 2), dkv=_tile(32, 32, 8, 2)
    )


def _float32_tiles(size: int) -> Tiles:
    # Full-precision products run outside of the tensor cores, from registers.
    if size <= 64:
        tile = _tile(64, 32, 8, 2)
    elif size <= 128:
        tile = _tile(32, 32, 8, 2)
    else:
        tile = _tile(16, 16, 4, 1)
    return Tiles(forward=tile, dq=tile, dkv=tile)


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
