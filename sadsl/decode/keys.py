"""The keys and values of earlier tokens, and arrays with an entry for each of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sadsl.decode.pages import PageTable, gathered, put, taken
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
    channels of the keys. With ``pages``, keys and values are ``[num_pages,
    num_kv_heads, page_size, dim]``; all else stays by sequence, since it is small.
    """

    rows: Rows
    pages: PageTable | None = None

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
    if key ``i`` is at position ``i``. With ``pages``, keys and values lie in these.
    """

    rows: Rows
    position: Int[Array, "*batch keys"] | None
    pages: PageTable | None = None


class NewEntries(NamedTuple):
    """New tokens of a store: after ``count`` others; the first ``valid`` exist."""

    rows: Rows
    size: int
    count: Int[Array, "*batch"]
    valid: Int[Array, " batch"] | int

    def by_sequence(self, batch: int) -> tuple[Array, Array]:
        """``count`` and ``valid`` of each sequence."""
        count, valid = (
            jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,))
            for x in (self.count, self.valid)
        )
        return count, valid


def written(
    store: KeyStore, new: NewEntries, slots: CacheSlots, axes: Axes
) -> KeyStore:
    """The store with new tokens."""
    if store.pages is not None:
        return _written_in_pages(store, new, slots, axes)
    return KeyStore(_written_by_slot(store.rows, new, slots, axes))


def _written_in_pages(
    store: KeyStore, new: NewEntries, slots: CacheSlots, axes: Axes
) -> KeyStore:
    """The store with new tokens in the pages that they begin, or that have room."""
    assert store.pages is not None
    count, valid = new.by_sequence(len(store.pages.table))
    pages = taken(store.pages, count, valid, new.size)
    pools = {
        name: put(store.rows[name], new.rows[name], pages, count, valid)
        for name in (K, V)
        if name in store.rows
    }
    others = {name: x for name, x in store.rows.items() if name not in pools}
    return KeyStore(pools | dict(_written_by_slot(others, new, slots, axes)), pages)


def _written_by_slot(
    rows: Rows, new: NewEntries, slots: CacheSlots, axes: Axes
) -> Rows:
    """The arrays, ``[batch, ...]``, with the entries of new tokens."""
    if not rows:
        return rows
    at_once = new.count.ndim == 0 and isinstance(new.valid, int)
    if at_once and (new.size == 1 or slots.hold_all):
        at = slots.of(new.count)

        def write(old: Array, x: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, x, at, axis)

    else:
        counts, valids = new.by_sequence(len(next(iter(rows.values()))))
        where = jax.vmap(lambda c, n: slots.written(c, new.size, n))(counts, valids)
        row = jnp.arange(len(counts), dtype=jnp.int32)[:, None]

        def write(old: Array, x: Array, axis: int) -> Array:
            # No axis of the cache moves, so that the write is in place.
            at = (row, *[slice(None)] * (axis - 1), where)
            return old.at[at].set(jnp.moveaxis(x, axis, 1), mode="drop")

    return _each(write, rows, new, axes)


def seen(
    before: KeyStore, after: KeyStore, new: NewEntries, slots: CacheSlots, axes: Axes
) -> Seen:
    """The keys that new tokens may see.

    Later tokens of a chunk may take the slot of a key that earlier ones still see. Then
    the new keys go behind the store instead of into it.
    """
    if slots.hold_all:
        return Seen(after.rows, None, after.pages)
    if new.size == 1:
        return Seen(after.rows, slots.positions(new.count + 1))
    positions = [slots.positions(new.count), positions_of(new.count, new.size)]

    def join(old: Array, x: Array, axis: int) -> Array:
        return jnp.concatenate([old, x], axis)

    rows = _each(join, before.rows, new, axes)
    return Seen(rows, jnp.concatenate(positions, axis=-1))


def in_order(seen: Seen, length: int, axes: Axes) -> Seen:
    """The keys of paged caches side by side, ``length`` of each sequence: a copy."""
    if seen.pages is None:
        return seen
    rows = {}
    for name, x in seen.rows.items():
        by_slot = gathered(x, seen.pages) if name in (K, V) else x
        rows[name] = jax.lax.slice_in_dim(by_slot, 0, length, axis=axes[name])
    return Seen(rows, None)


def positions_of(count: Int[Array, "*batch"], size: int) -> Int[Array, "*batch size"]:
    """The positions of ``size`` new tokens after ``count``."""
    index = jnp.arange(size, dtype=jnp.int32).reshape(*[1] * count.ndim, size)
    return count[..., None] + index


def _each(
    change: Callable[[Array, Array, int], Array],
    rows: Rows,
    new: NewEntries,
    axes: Axes,
) -> Rows:
    """``change(old, new, axis)`` of every array; new entries as those of the store."""
    found = {}
    for name, old in rows.items():
        axis = axes[name]
        shape = *old.shape[:axis], new.size, *old.shape[axis + 1 :]
        x = jnp.broadcast_to(new.rows[name], shape).astype(old.dtype)
        found[name] = change(old, x, axis)
    return found


def empty(
    shape: tuple[int, int, int], dims: Mapping[str, int], dtype: Any
) -> dict[str, Array]:
    """Keys and values of no tokens.

    ``shape`` is ``(batch, num_kv_heads, slots)``, or ``(num_pages, num_kv_heads,
    page_size)``.
    """
    return {name: jnp.zeros((*shape, dim), dtype) for name, dim in dims.items()}
