"""Layout: another order of the positions, and how arrays are moved there and back.

Positions fill a row-major array. Each of its axes is written in digits of a mixed
radix, and the digits are transposed: residue classes and tiles of a grid are such
orders. A slot is a place in the new order. Slots that hold no position are padding.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lowering import ir


@dataclass(frozen=True)
class Axis:
    """An axis of ``size`` coordinates in digits, the most significant digit first."""

    size: int
    radices: tuple[int, ...]

    @property
    def padded(self) -> int:
        """How many coordinates the digits can express, at least ``size``."""
        return prod(self.radices)


@dataclass(frozen=True)
class Layout:
    """An order of ``length`` positions, which fill ``axes`` row by row.

    ``order`` lists the digits of all axes as slots count them, from the slowest to the
    fastest; digits are numbered over the axes from the first to the last.
    """

    length: int
    axes: tuple[Axis, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.radices))):
            raise ValueError(
                f"order={self.order} must name each of the {len(self.radices)} digits "
                "of the axes exactly once"
            )
        cells = prod(axis.size for axis in self.axes)
        if cells < self.length or any(a.padded < a.size for a in self.axes):
            raise ValueError(
                f"axes={self.axes} cannot hold {self.length} positions: the sizes must "
                "multiply to at least that, and the radices to at least the size"
            )

    @cached_property
    def radices(self) -> tuple[int, ...]:
        """The radices of all digits, axis after axis."""
        return tuple(r for axis in self.axes for r in axis.radices)

    @property
    def num_slots(self) -> int:
        """The number of slots: positions and padding."""
        return prod(self.radices)

    @cached_property
    def positions(self) -> Int[np.ndarray, "num_slots"]:
        """The position in every slot, -1 where there is none."""
        grid = np.arange(prod(a.size for a in self.axes))
        grid = np.where(grid < self.length, grid, -1)
        grid = grid.reshape([a.size for a in self.axes])
        pads = [(0, a.padded - a.size) for a in self.axes]
        grid = np.pad(grid, pads, constant_values=-1)
        return grid.reshape(self.radices).transpose(self.order).ravel()

    def check(self) -> None:
        """Checks that each position has exactly one slot.

        Raises:
          ValueError: a position has no slot, or two.
        """
        found = np.bincount(self.positions[self.positions >= 0], minlength=self.length)
        wrong = np.flatnonzero(found != 1)
        if len(wrong) or len(found) != self.length:
            raise ValueError(
                f"{self} is no permutation: position {wrong[:1]} has no slot of its own"
            )

    def digits(self, slot: ir.Expr) -> dict[int, ir.Expr]:
        """The digits of the position in ``slot``, by their number over the axes."""
        ordered = tuple(self.radices[i] for i in self.order)
        found: dict[int, ir.Expr] = {}
        for i, radix, place in zip(self.order, ordered, places(ordered), strict=True):
            found[i] = ir.Mod(ir.FloorDiv(slot, place), radix)
        return found

    # --- of arrays ---

    def to_slots(self, x: jax.Array, axis: int) -> jax.Array:
        """``x`` with its positions along ``axis`` moved to slots; padding is zero."""
        x = _pad(x, axis, prod(a.size for a in self.axes))
        x = _unfold(x, axis, tuple(a.size for a in self.axes))
        for i, a in enumerate(self.axes):
            x = _pad(x, axis + i, a.padded)
        lead = x.shape[:axis]
        tail = x.shape[axis + len(self.axes) :]
        x = x.reshape(*lead, *self.radices, *tail)
        x = _transpose(x, axis, self.order)
        return x.reshape(*lead, self.num_slots, *tail)

    def to_positions(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of ``to_slots``; padding is dropped."""
        lead, tail = x.shape[:axis], x.shape[axis + 1 :]
        x = _unfold(x, axis, tuple(self.radices[i] for i in self.order))
        x = _transpose(x, axis, tuple(int(i) for i in np.argsort(self.order)))
        x = x.reshape(*lead, *(a.padded for a in self.axes), *tail)
        for i, a in enumerate(self.axes):
            x = jax.lax.slice_in_dim(x, 0, a.size, axis=axis + i)
        x = x.reshape(*lead, prod(a.size for a in self.axes), *tail)
        return jax.lax.slice_in_dim(x, 0, self.length, axis=axis)

    def __str__(self) -> str:
        names, first = {}, 0
        for letter, axis in zip("abcdefgh", self.axes, strict=False):
            for i, radix in enumerate(axis.radices):
                mark = "'" * (len(axis.radices) - 1 - i)
                names[first + i] = f"{letter}{mark}:{radix}"
            first += len(axis.radices)
        before = " ".join(names[i] for i in range(len(names)))
        after = " ".join(names[i] for i in self.order)
        return f"[{before}] -> [{after}]"


@lru_cache(maxsize=4096)
def places(radices: tuple[int, ...]) -> tuple[int, ...]:
    """The place value of each digit."""
    return tuple(prod(radices[i + 1 :]) for i in range(len(radices)))


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)


def _unfold(x: jax.Array, axis: int, sizes: tuple[int, ...]) -> jax.Array:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _transpose(x: jax.Array, first: int, order: tuple[int, ...]) -> jax.Array:
    """``x`` with the axes from ``first`` on in the order given."""
    before, after = range(first), range(first + len(order), x.ndim)
    return x.transpose(*before, *(first + i for i in order), *after)
