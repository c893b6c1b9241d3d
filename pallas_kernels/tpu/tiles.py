"""Default block sizes on TPUs."""

import json
from functools import cache, partial
from importlib import resources
from typing import Any

import jax.numpy as jnp

from pallas_kernels.config import Tile, TileCounter, Tiles, even_block
from pallas_kernels.tpu import chips
from pallas_kernels.tpu.runs import LANES

# Bundles that a grid step executes beside its tiles.
ROW_BUNDLES = 400
# Chips whose code was not counted have the matrix unit of one whose code was.
ALIKE = {"TPU v4": "tpu-v5e", "TPU v5": "tpu-v5e", "TPU v5p": "tpu-v5e"}
COUNTED = {
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v6 lite": "tpu-v6e",
    "TPU v6e": "tpu-v6e",
    "TPU7x": "tpu7x",
}
UNKNOWN = "tpu-v6e"


def default_tiles(
    lengths: tuple[int, int],
    head_dim: int,
    head_dim_v: int,
    dtype: Any,
    counts: TileCounter | None = None,
) -> Tiles:
    """Block sizes that fit every supported TPU, smaller for shorter sequences.

    ``counts(block_q, block_kv)`` counts the tiles that a call visits. With it, each
    kernel gets the tile with the fewest bundles: those of a tile times the visited
    tiles, and ``ROW_BUNDLES`` for each row. Large tiles cost less for a pair, and cover
    more pairs that do not attend. Bundles were counted by
    ``benchmarks/tpu_tiles.py`` for 16-bit operands of up to 128 channels.
    """
    dim, half = max(head_dim, head_dim_v), jnp.dtype(dtype) == jnp.bfloat16
    # A product in full f32 takes six passes: a wide one unrolls into too much code.
    block = 256 if dim > 128 and not half else 512
    tile = Tile(block_q=block, block_kv=block)
    if counts is None or dim > 128 or not half:
        return _fitted(Tiles(tile, tile, tile), lengths)
    bundles = _bundles(_counted_chip(), 64 if dim <= 64 else 128)
    costs: dict[str, dict[Tile, float]] = {"forward": {}, "backward": {}}
    for (block_q, block_kv), of_kernel in bundles.items():
        tile = Tile(block_q=block_q, block_kv=block_kv)
        tile = _fitted(Tiles(tile, tile, tile), lengths).forward
        found = counts(tile.block_q, tile.block_kv)
        share = tile.block_q * tile.block_kv / (block_q * block_kv)
        for kernel, (full, tested) in of_kernel.items():
            cost = share * (found.full * full + found.partial * tested)
            rows = found.q_rows if kernel == "forward" else found.kv_rows
            costs[kernel].setdefault(tile, cost + ROW_BUNDLES * rows)
    forward, backward = (min(x, key=x.__getitem__) for x in costs.values())
    # No kernel has the tile ``dq``: with that of the forward pass, one plan is both.
    return Tiles(forward, forward, backward)


def _fitted(tiles: Tiles, lengths: tuple[int, int]) -> Tiles:
    # Both blocks are multiples of LANES: keys lie along the lanes in the forward
    # kernel, and queries in the backward one.
    return tiles.fitted(lengths, partial(even_block, multiple=LANES))


def _counted_chip() -> str:
    kind = chips.device_kind() or ""
    return COUNTED.get(kind) or ALIKE.get(kind, UNKNOWN)


@cache
def _bundles(chip: str, head_dim: int) -> dict[tuple[int, int], dict[str, list[int]]]:
    """By tile and kernel, the bundles of a full and of a partial tile."""
    text = resources.files("pallas_kernels.tpu").joinpath("bundles.json").read_text()
    found = json.loads(text)[chip][str(head_dim)]
    return {
        (int(block_q), int(block_kv)): kernels
        for name, kernels in found.items()
        for block_q, block_kv in [name.split("x")]
    }
