"""Runs an exchange inside of ``shard_map``: keys of other shards, with positions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lowering.partition.exchange import Exchange, Send
from sadsl.sharding.shard import Shard

# Arrays with an entry for each key, by name, and the axis of the keys.
Rows: TypeAlias = Mapping[str, Array]
Axes: TypeAlias = Mapping[str, int]


class ShardKeys(NamedTuple):
    """ShardKeys that a shard has, its own or received ones.

    ``position`` is that of each key, int32 ``[keys]``, -1 for none.
    """

    rows: Rows
    position: Int[Array, " keys"]


def every(shard: Shard, rows: Rows, axes: Axes) -> ShardKeys:
    """The keys of all shards, in order."""
    length = shard.shards.kv_seq_len
    whole = {n: shard.gathered(x, axes[n], length) for n, x in rows.items()}
    return ShardKeys(whole, jnp.arange(length, dtype=jnp.int32))


def joined(parts: Sequence[ShardKeys], axes: Axes) -> ShardKeys:
    """All keys of several parts."""
    rows = {
        name: jnp.concatenate([part.rows[name] for part in parts], axes[name])
        for name in parts[0].rows
    }
    return ShardKeys(rows, jnp.concatenate([part.position for part in parts]))


def span(shard: Shard, rows: Rows, axes: Axes, found: Exchange) -> ShardKeys:
    """The own keys with those of the halo on both sides, in order."""
    size = found.shards.granule

    def widened(x: Array, axis: int) -> Array:
        before = _halo(shard, x, axis, found.before * size, forward=True)
        after = _halo(shard, x, axis, found.after * size, forward=False)
        parts = [*before, x, *after]
        return jnp.concatenate(parts, axis) if len(parts) > 1 else x

    wide = {name: widened(x, axes[name]) for name, x in rows.items()}
    first = shard.first_key - found.before * size
    count = shard.shards.kv_size + (found.before + found.after) * size
    position = first + jnp.arange(count, dtype=jnp.int32)
    exists = (position >= 0) & (position < shard.shards.kv_seq_len)
    return ShardKeys(wide, jnp.where(exists, position, -1))


def _halo(
    shard: Shard, x: Array, axis: int, width: int, *, forward: bool
) -> list[Array]:
    """The last ``width`` entries before the shard, or the first ones after it.

    Shards at the end of the sequence receive zeros.
    """
    size, count = x.shape[axis], shard.shards.count
    found = []
    for distance in range(1, -(-width // size) + 1):
        part = min(size, width - (distance - 1) * size)
        if forward:
            sent = jax.lax.slice_in_dim(x, size - part, size, axis=axis)
            pairs = [(i, i + distance) for i in range(count - distance)]
        else:
            sent = jax.lax.slice_in_dim(x, 0, part, axis=axis)
            pairs = [(i + distance, i) for i in range(count - distance)]
        found.append(jax.lax.ppermute(sent, shard.axis, pairs))
    return found[::-1] if forward else found


def others(shard: Shard, rows: Rows, axes: Axes, found: Exchange) -> ShardKeys | None:
    """The shared keys and those that were sent; None if there are none.

    ShardKeys that are in the span of this shard have no position here.
    """
    parts = [_shared(shard, rows, axes, found)] if found.shared else []
    parts += [_sent(shard, rows, axes, send) for send in found.sends]
    if not parts:
        return None
    received, position = joined(parts, axes)
    size, first = found.shards.granule, shard.first_key
    low = first - found.before * size
    high = first + shard.shards.kv_size + found.after * size
    elsewhere = (position < low) | (position >= high)
    exists = elsewhere & (position < shard.shards.kv_seq_len)
    return ShardKeys(received, jnp.where(exists, position, -1))


def _shared(shard: Shard, rows: Rows, axes: Axes, found: Exchange) -> ShardKeys:
    """Granules that all shards get: each adds its own to a sum."""
    granules = np.asarray(found.shared)
    per_shard, size = found.shards.granules, found.shards.granule
    local = _positions(granules % per_shard, size)
    mine = np.repeat(granules // per_shard, size) == shard.index

    def summed(x: Array, axis: int) -> Array:
        own = jnp.take(x, local, axis=axis)
        shape = [1] * own.ndim
        shape[axis] = len(local)
        kept = jnp.where(mine.reshape(shape), own, jnp.zeros((), own.dtype))
        return jax.lax.psum(kept, shard.axis)

    shared = {name: summed(x, axes[name]) for name, x in rows.items()}
    return ShardKeys(shared, jnp.asarray(_positions(granules, size), jnp.int32))


def _sent(shard: Shard, rows: Rows, axes: Axes, send: Send) -> ShardKeys:
    """Granules of the shard at some distance before this one, in a circle."""
    shards = shard.shards
    table = jnp.asarray(send.granules, jnp.int32)
    pairs = [(i, (i + send.distance) % shards.count) for i in range(shards.count)]
    mine = _positions(jnp.maximum(table[shard.index], 0), shards.granule)
    received = {
        name: jax.lax.ppermute(jnp.take(x, mine, axis=axes[name]), shard.axis, pairs)
        for name, x in rows.items()
    }
    sender = (shard.index - send.distance) % shards.count
    local = table[sender]
    position = _positions(sender * shards.granules + local, shards.granule)
    there = jnp.repeat(local >= 0, shards.granule)
    return ShardKeys(received, jnp.where(there, position, -1).astype(jnp.int32))


def _positions(granules: Array | np.ndarray, size: int) -> Array | np.ndarray:
    """The keys of granules, in order."""
    each = np.arange(size, dtype=np.int32)[None]
    return (granules[:, None] * size + each).reshape(-1)
