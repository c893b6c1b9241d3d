"""Divides positions into parts: blocks of one size, or the tiles of a grid."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from typing_extensions import override

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.symbols import Symbol, Truth

Position = TypeVar("Position", Symbol, np.ndarray)


@dataclass(frozen=True, repr=False)
class GridTiles:
    """Tiles of a grid whose cells are the positions, row-major; made by ``tiles``."""

    sizes: tuple[int, ...]
    tile: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.tile):
            raise ValueError(
                f"tiles: sizes={self.sizes} and tile={self.tile} must have one entry "
                "each for every axis of the grid"
            )
        for name in ("sizes", "tile"):
            for value in getattr(self, name):
                at_least("tiles", f"an entry of {name}", value, 1)

    @override
    def __repr__(self) -> str:
        return call_text(self, "tiles")

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of tiles along each axis."""
        return tuple(-(-n // t) for n, t in zip(self.sizes, self.tile, strict=True))

    @property
    def num_positions(self) -> int:
        """The number of cells of the grid."""
        return math.prod(self.sizes)


# An integer is the size of a block of consecutive positions.
Partition: TypeAlias = int | GridTiles


def tiles(sizes: tuple[int, ...], tile: tuple[int, ...]) -> GridTiles:
    """The tiles of a grid, as the ``block`` of ``topk`` and others.

    The positions are the cells of the grid in row-major order, and so are the numbers
    of the tiles. Tiles at the end of an axis may be smaller.

    Args:
      sizes: the size of the grid along each axis.
      tile: the size of a tile along each axis.

    Raises:
      ValueError: the two have different lengths, or a size is below 1.

    Example:
      >>> import sadsl as sa
      >>> quarters = tiles((4, 6), (2, 3))
      >>> quarters.counts
      (2, 2)
      >>> sa.topk(1, block=quarters)
      topk(1, block=tiles((4, 6), (2, 3)))
    """
    return GridTiles(tuple(sizes), tuple(tile))


@dataclass(frozen=True, repr=False)
class WithinPart(IndexMap):
    """A query sees the keys of its own part; made by ``within``."""

    partition: Partition

    def __post_init__(self) -> None:
        check("within", "partition", self.partition)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return part_of(self.partition, q) == part_of(self.partition, k)

    @override
    def __repr__(self) -> str:
        return call_text(self, "within")


def within(partition: Partition) -> WithinPart:
    """A query sees the keys of its own tile: ``blocks``, but for the tiles of a grid.

    Example:
      >>> print(within(tiles((2, 4), (2, 2))).picture(8))
      ##..##..
      ##..##..
      ..##..##
      ..##..##
      ##..##..
      ##..##..
      ..##..##
      ..##..##
    """
    return WithinPart(partition)


def check(map_name: str, name: str, partition: object) -> None:
    """Raises an error unless a partition is tiles or an integer of at least 1."""
    if not isinstance(partition, GridTiles):
        at_least(map_name, name, partition, 1)


def part_of(partition: Partition, x: Position) -> Position:
    """The number of the part that a position is in; a symbol or an array."""
    match partition:
        case GridTiles(sizes, tile):
            found = x * 0
            for axis, count in enumerate(partition.counts):
                if count > 1:
                    inner = math.prod(sizes[axis + 1 :])
                    cell = x // inner if axis == 0 else x // inner % sizes[axis]
                    step = math.prod(partition.counts[axis + 1 :])
                    found = found + cell // tile[axis] * step
            return found
        case size:
            return x if size == 1 else x // size


def num_parts(partition: Partition, length: int) -> int:
    """The number of parts of ``length`` positions."""
    match partition:
        case GridTiles():
            return math.prod(partition.counts)
        case size:
            return -(-length // size)


def check_length(partition: Partition, length: int, what: str) -> None:
    """Checks that the grid of some tiles has as many cells as there are positions.

    Raises:
      ValueError: it has more or fewer.
    """
    if isinstance(partition, GridTiles) and partition.num_positions != length:
        raise ValueError(
            f"{partition!r} has {partition.num_positions} positions, but there are "
            f"{length} {what}: give the sizes of a grid with {length} cells"
        )


@lru_cache(maxsize=64)
def _members(partition: GridTiles) -> tuple[np.ndarray, np.ndarray]:
    """``positions`` of tiles."""
    label = part_of(partition, np.arange(partition.num_positions))
    order = np.argsort(label, kind="stable")
    count = np.bincount(label, minlength=num_parts(partition, 0))
    slot = np.arange(count.max())
    real = slot < count[:, None]
    at = np.minimum((np.cumsum(count) - count)[:, None] + slot, len(label) - 1)
    return np.where(real, order[at], 0), real


def positions(partition: Partition, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions of each part, and which of them are not padding.

    Two arrays ``[parts, most]``, where ``most`` is the size of the largest part.
    """
    if isinstance(partition, GridTiles):
        return _members(partition)
    found = np.arange(num_parts(partition, length) * partition).reshape(-1, partition)
    return np.minimum(found, length - 1), found < length


def grouped(
    x: Array, partition: Partition, axis: int
) -> tuple[Array, Bool[np.ndarray, "parts most"]]:
    """Splits an axis into ``[parts, most]``, with zeros where a part is shorter.

    Also returns which entries are not padding.
    """
    axis %= x.ndim
    at, real = positions(partition, x.shape[axis])
    if isinstance(partition, GridTiles):
        found = jnp.take(x, jnp.asarray(at), axis=axis)
        shape = [1] * found.ndim
        shape[axis : axis + 2] = real.shape
        return jnp.where(real.reshape(shape), found, 0), real
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, real.size - x.shape[axis])
    padded = jnp.pad(x, widths)
    return padded.reshape(*x.shape[:axis], *real.shape, *x.shape[axis + 1 :]), real


def pooled(
    x: Float[Array, "*leading seq dim"], partition: Partition, how: str
) -> Float[Array, "*leading parts dim"]:
    """The "mean", "min" or "max" of the rows of each part, float32."""
    if partition == 1:
        return x.astype(jnp.float32)
    found, real = grouped(x.astype(jnp.float32), partition, -2)
    real = real[:, :, None]
    match how:
        case "mean":
            # The padding of short parts is 0 and adds nothing.
            count = real.sum(axis=-2).astype(np.float32)
            return jnp.sum(found, axis=-2) / _of_rank(count, x.ndim)
        case "min":
            best = jnp.where(_of_rank(real, x.ndim + 1), found, jnp.inf).min(axis=-2)
        case "max":
            best = jnp.where(_of_rank(real, x.ndim + 1), found, -jnp.inf).max(axis=-2)
        case _:
            raise AssertionError(how)
    # The maximum of XLA:CPU may drop a NaN.
    return jnp.where(jnp.isfinite(found).all(axis=-2), best, jnp.nan)


def _of_rank(x: np.ndarray, rank: int) -> np.ndarray:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)
