"""The keys and values of earlier tokens, and arrays with an entry for each of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sadsl.decode.slots import CacheSlots

# The names of keys and values among the arrays of a store. They are no identifiers, so
# no caller's names.
K, V = "cache.k", "cache.v"

# Arrays by name, and the axis of their keys.
Rows: TypeAlias = Mapping[str, Array]
Axes: TypeAlias = Mapping[str, int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyStore:
    """Arrays with an entry for each slot.

    ``rows`` holds keys and values ``[batch, num_kv_heads, slots, dim]``, and what maps
    and choices read at the key, such as segment ids. There are no values if they are
    channels of the keys.
    """

    rows: Rows

    @property
    def k(self) -> Array:
        """The keys by slot, with the heads in front."""
        return self.rows[K]

    @property
    def v(self) -> Array | None:
        """The values by slot, or None."""
        return self.rows.get(V)


class Seen(NamedTuple):
    """The keys that the queries of a call may see, in the form of the store.

    ``position`` is that of each key, -1 for none, ``[keys]`` or ``[batch, keys]``; None
    if key ``i`` is at position ``i``.
    """

    rows: Rows
    position: Int[Array, "*batch keys"] | None


class NewEntries(NamedTuple):
    """New tokens of a store: after ``count`` others; the first ``valid`` exist."""

    rows: Rows
    size: int
    count: Int[Array, "*batch"]
    valid: Int[Array, " batch"] | int


def written(
    store: KeyStore, new: NewEntries, slots: CacheSlots, axes: Axes
) -> KeyStore:
    """The store with new tokens."""
    at_once = new.count.ndim == 0 and isinstance(new.valid, int)
    if at_once and (new.size == 1 or slots.hold_all):
        at = slots.of(new.count)

        def put(old: Array, x: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, x, at, axis)

    else:
        batch = (len(store.k),)
        counts, valids = (
            jnp.broadcast_to(jnp.asarray(x, jnp.int32), batch)
            for x in (new.count, new.valid)
        )
        where = jax.vmap(lambda c, n: slots.written(c, new.size, n))(counts, valids)

        def put(old: Array, x: Array, axis: int) -> Array:
            def of_entry(old: Array, x: Array, at: Array) -> Array:
                rows = jnp.moveaxis(x, axis - 1, 0)
                front = jnp.moveaxis(old, axis - 1, 0).at[at].set(rows, mode="drop")
                return jnp.moveaxis(front, 0, axis - 1)

            return jax.vmap(of_entry)(old, x, where)

    return KeyStore(_each(put, store, new, axes))


def seen(
    before: KeyStore, after: KeyStore, new: NewEntries, slots: CacheSlots, axes: Axes
) -> Seen:
    """The keys that new tokens may see.

    Later tokens of a chunk may take the slot of a key that earlier ones still see. Then
    the new keys go behind the store instead of into it.
    """
    if slots.hold_all:
        return Seen(after.rows, None)
    if new.size == 1:
        return Seen(after.rows, slots.positions(new.count + 1))
    positions = [slots.positions(new.count), positions_of(new.count, new.size)]

    def join(old: Array, x: Array, axis: int) -> Array:
        return jnp.concatenate([old, x], axis)

    rows = _each(join, before, new, axes)
    return Seen(rows, jnp.concatenate(positions, axis=-1))


def positions_of(count: Int[Array, "*batch"], size: int) -> Int[Array, "*batch size"]:
    """The positions of ``size`` new tokens after ``count``."""
    index = jnp.arange(size, dtype=jnp.int32).reshape(*[1] * count.ndim, size)
    return count[..., None] + index


def _each(
    change: Callable[[Array, Array, int], Array],
    store: KeyStore,
    new: NewEntries,
    axes: Axes,
) -> Rows:
    """``change(old, new, axis)`` of every array; new entries as those of the store."""
    found = {}
    for name, old in store.rows.items():
        axis = axes[name]
        shape = *old.shape[:axis], new.size, *old.shape[axis + 1 :]
        x = jnp.broadcast_to(new.rows[name], shape).astype(old.dtype)
        found[name] = change(old, x, axis)
    return found


def empty(
    shape: tuple[int, int, int], dims: Mapping[str, int], dtype: Any
) -> dict[str, Array]:
    """Keys and values of no tokens; ``shape`` is ``(batch, num_kv_heads, slots)``."""
    return {name: jnp.zeros((*shape, dim), dtype) for name, dim in dims.items()}
