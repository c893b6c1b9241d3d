"""Rows of arrays copied to slots and added up from them, the same way every time.

A slot holds a copy of one position, or nothing; a position may be in any number of
slots. ``take`` fills slots, ``add_up`` adds them to their positions. Each is the
transpose of the other, and neither adds in an order that a device chooses.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lowering.run_time.adjoint import linear
from pallas_kernels.precision import wide
from pallas_kernels.varying import vary


class Slots(NamedTuple):
    """Which position every slot copies, and which slots every position has."""

    position: Int32[Array, "rows slots"]  # the number of positions where there is none
    order: Int32[Array, "rows slots"]  # the slots by their position
    start: Int32[Array, "rows positions_and_one"]  # where a position begins in order

    @property
    def counts(self) -> Int32[Array, "rows positions"]:
        """The slots of every position."""
        return self.start[:, 1:] - self.start[:, :-1]


def slots_of(position: Int32[Array, "rows slots"], length: int) -> Slots:
    """The slots that copy ``position`` of ``length``, which stands for none."""
    order = jnp.argsort(position, axis=-1, stable=True).astype(jnp.int32)
    sorted_ = jnp.take_along_axis(position, order, axis=1)
    edges = jnp.arange(length + 1, dtype=jnp.int32)
    start = jax.vmap(lambda row: jnp.searchsorted(row, edges))(sorted_)
    return Slots(position, order, start.astype(jnp.int32))


def take(
    x: Float[Array, "rows positions dim"], slots: Slots
) -> Float[Array, "rows slots dim"]:
    """The copies in slots; those of no position hold 0."""
    return linear(_take, _add_up, x, slots)


def add_up(
    y: Float[Array, "rows slots dim"], slots: Slots
) -> Float[Array, "rows positions dim"]:
    """The sum over the slots of every position, in their order; at least float32.

    As many passes as the most slots that a position has, each of which adds one slot to
    every position.
    """
    return linear(_add_up, _take, y, slots, dtype=wide(y.dtype))


def _take(x: Array, slots: Slots) -> Array:
    at = slots.position[..., None]
    return jnp.take_along_axis(x, at, axis=1, mode="fill", fill_value=0)


def _add_up(y: Array, slots: Slots) -> Array:
    first, counts = slots.start[:, :-1], slots.counts
    dtype = wide(y.dtype)

    def add_one(i: Any, total: Array) -> Array:
        at = jnp.minimum(first + i, y.shape[1] - 1)
        slot = jnp.take_along_axis(slots.order, at, axis=1)
        part = jnp.take_along_axis(y, slot[..., None], axis=1).astype(dtype)
        return total + jnp.where((i < counts)[..., None], part, 0)

    zero = jnp.zeros((*first.shape, y.shape[2]), dtype)
    return jax.lax.fori_loop(0, counts.max(), add_one, vary(zero, y, slots))
