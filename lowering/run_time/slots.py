"""Copies positions to slots, and adds slots up to positions, deterministically.

A slot holds a copy of one position, or nothing; a position may be in any number of
slots. ``take`` fills slots, ``add_up`` adds them to their positions. Each is the
transpose of the other, and additions have a fixed order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lowering.run_time.adjoint import linear
from pallas_kernels.precision import wide
from pallas_kernels.varying import vary


class Slots(NamedTuple):
    """The position of every slot, and the slots of every position."""

    position: Int32[Array, "rows slots"]  # the number of positions if a slot is empty
    order: Int32[Array, "rows slots"]  # the slots, sorted by position
    start: Int32[Array, "rows positions_and_one"]  # where each position begins in order

    @property
    def counts(self) -> Int32[Array, "rows positions"]:
        """How many slots every position has."""
        return self.start[:, 1:] - self.start[:, :-1]


def slots_of(position: Int32[Array, "rows slots"], length: int) -> Slots:
    """The slots that copy ``position``; the value ``length`` marks an empty slot."""
    order = jnp.argsort(position, axis=-1, stable=True).astype(jnp.int32)
    sorted_ = jnp.take_along_axis(position, order, axis=1)
    edges = jnp.arange(length + 1, dtype=jnp.int32)
    start = jax.vmap(lambda row: jnp.searchsorted(row, edges))(sorted_)
    return Slots(position, order, start.astype(jnp.int32))


def take(
    x: Float[Array, "rows positions dim"], slots: Slots
) -> Float[Array, "rows slots dim"]:
    """``x`` copied to slots; empty slots hold 0."""
    return linear(_take, _add_up, x, slots)


def add_up(
    y: Float[Array, "rows slots dim"], slots: Slots
) -> Float[Array, "rows positions dim"]:
    """The sum over the slots of every position, in a fixed order, at least in float32.

    Each pass adds one slot to every position: there are as many passes as the most
    slots of a position.
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
