"""How positions fall into cells: blocks of a size, or the tiles of a grid."""

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
    """Tiles of a grid whose cells are the positions, row-major; see ``tiles``."""

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
        return call_text(self)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(-(-n // t) for n, t in zip(self.sizes, self.tile, strict=True))

    @property
    def num_positions(self) -> int:
        """The cells of the grid."""
        return math.prod(self.sizes)


# An integer is the size of a block of neighbouring positions.
Partition: TypeAlias = int | GridTiles


def tiles(sizes: tuple[int, ...], tile: tuple[int, ...]) -> GridTiles:
    """Tiles of ``tile`` on a grid of ``sizes``; those at the edges may be smaller.

    Positions are row-major in the grid, and tiles among each other.
    ``tiles((4, 6), (2, 3))`` are four tiles of two rows and three columns.
    """
    return GridTiles(tuple(sizes), tuple(tile))


@dataclass(frozen=True, repr=False)
class WithinPart(IndexMap):
    """The query and the key are in one part of ``partition``."""

    partition: Partition

    def __post_init__(self) -> None:
        check("within", "partition", self.partition)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return part_of(self.partition, q) == part_of(self.partition, k)

    @override
    def __repr__(self) -> str:
        return call_text(self)


def within(partition: Partition) -> WithinPart:
    """The query and the key are in one tile: ``blocks``, for tiles of a grid."""
    return WithinPart(partition)


def check(map_name: str, name: str, partition: object) -> None:
    """Refuses what is neither a size of at least 1 nor tiles."""
    if not isinstance(partition, GridTiles):
        at_least(map_name, name, partition, 1)


def part_of(partition: Partition, x: Position) -> Position:
    """The part that a position is in, a symbol or an array."""
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
    """Parts that ``length`` positions fall into."""
    match partition:
        case GridTiles():
            return math.prod(partition.counts)
        case size:
            return -(-length // size)


def check_length(partition: Partition, length: int, what: str) -> None:
    """Refuses tiles of a grid that is not as large as the sequence."""
    if isinstance(partition, GridTiles) and partition.num_positions != length:
        raise ValueError(
            f"{partition!r} has {partition.num_positions} positions, and there are "
            f"{length} {what}: the grid must have as many"
        )


@lru_cache(maxsize=64)
def _members(
    partition: GridTiles,
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of every tile, ``[tiles, most]``, padded, and which are real."""
    label = part_of(partition, np.arange(partition.num_positions))
    order = np.argsort(label, kind="stable")
    count = np.bincount(label, minlength=num_parts(partition, 0))
    slot = np.arange(count.max())
    real = slot < count[:, None]
    at = np.minimum((np.cumsum(count) - count)[:, None] + slot, len(label) - 1)
    return np.where(real, order[at], 0), real


def positions(partition: Partition, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions of every part, ``[parts, most]``, padded, and which are real."""
    if isinstance(partition, GridTiles):
        return _members(partition)
    found = np.arange(num_parts(partition, length) * partition).reshape(-1, partition)
    return np.minimum(found, length - 1), found < length


def grouped(
    x: Array, partition: Partition, axis: int
) -> tuple[Array, Bool[np.ndarray, "parts most"]]:
    """The axis as ``[parts, most]``, zeros where a part is short, and what is real."""
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
    """The "mean", "min" or "max" of every part over its real rows, float32."""
    if partition == 1:
        return x.astype(jnp.float32)
    found, real = grouped(x.astype(jnp.float32), partition, -2)
    real = real[:, :, None]
    match how:
        case "mean":
            # Short parts were filled up with zeros.
            count = real.sum(axis=-2).astype(np.float32)
            return jnp.sum(found, axis=-2) / _of_rank(count, x.ndim)
        case "min":
            best = jnp.where(_of_rank(real, x.ndim + 1), found, jnp.inf).min(axis=-2)
        case "max":
            best = jnp.where(_of_rank(real, x.ndim + 1), found, -jnp.inf).max(axis=-2)
        case _:
            raise AssertionError(how)
    # CPUs may lose a NaN in a maximum.
    return jnp.where(jnp.isfinite(found).all(axis=-2), best, jnp.nan)


def _of_rank(x: np.ndarray, rank: int) -> np.ndarray:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)
