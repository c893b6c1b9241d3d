"""Arranges the arrays of a call by lists into strips of rows, for the XLA backend."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.call import Inputs, Vectors
from pallas_kernels.lists.call import ListCall, num_blocks
from pallas_kernels.precision import wide, widened

# A strip gathers so many bytes of keys and values, which fit the cache of a core: 4 MiB
# take twice the time. It has at most so many rows.
MOST_BYTES = 1 << 20
MOST_ROWS = 32


class ListSizes(NamedTuple):
    """The sizes of a call by lists.

    A *unit* is the query heads that share a list and a key head: ``units`` of each
    batch entry, with ``heads`` query heads each.
    """

    batch: int
    units: int
    heads: int
    kv_heads: int
    groups: int
    lists: int  # batch entries of the lists
    q_seq_len: int
    kv_seq_len: int
    rows: int  # rows in a strip
    strips: int
    listed: int  # blocks in a list


def sizes_of(inputs: Inputs, index: Array, call: ListCall) -> ListSizes:
    """The sizes of a call, and how many rows a strip has."""
    batch, q_heads, q_seq_len, _ = inputs.q.shape
    _, kv_heads, kv_seq_len, _ = inputs.k.shape
    lists, groups, count, listed = index.shape
    units = max(groups, kv_heads)
    width = np.dtype(wide(inputs.k.dtype)).itemsize
    width *= inputs.k.shape[3] + inputs.v.shape[3]
    most = MOST_BYTES // (listed * call.block_kv * width)
    rows = max(1, min(MOST_ROWS, most, count))
    return ListSizes(
        batch, units, q_heads // units, kv_heads, groups, lists, q_seq_len,
        kv_seq_len, rows, num_blocks(count, rows), listed,
    )  # fmt: skip


def by_rows(x: Array, sizes: ListSizes, call: ListCall, fill: Any = 0) -> Array:
    """``[batch, q_heads, q, ...]`` as ``[units, strips, rows, block_q, heads, ..]``."""
    rest = x.shape[3:]
    length = sizes.strips * sizes.rows * call.block_q
    widths = [(0, 0), (0, 0), (0, length - x.shape[2]), *[(0, 0)] * len(rest)]
    x = jnp.pad(x, widths, constant_values=fill)
    shape = sizes.strips, sizes.rows, call.block_q
    x = x.reshape(-1, sizes.heads, *shape, *rest)
    return jnp.moveaxis(x, 1, 4)


def from_rows(x: Array, sizes: ListSizes) -> Array:
    """The inverse of ``by_rows``."""
    rest = x.shape[5:]
    x = jnp.moveaxis(x, 4, 1)
    x = x.reshape(sizes.batch, sizes.units * sizes.heads, -1, *rest)
    return x[:, :, : sizes.q_seq_len]


def by_blocks(x: Array, call: ListCall) -> Array:
    """``[batch, heads, kv, ...]`` as ``[batch * heads, blocks + 1, block_kv, ...]``.

    The last block is 0. Blocks that no query of a row sees are read there.
    """
    rest = x.shape[3:]
    blocks = num_blocks(x.shape[2], call.block_kv) + 1
    after = blocks * call.block_kv - x.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, after), *[(0, 0)] * len(rest)])
    return x.reshape(-1, blocks, call.block_kv, *rest)


def lists_by_rows(index: Array, sizes: ListSizes, blocks: int) -> Array:
    """The lists as ``[lists * groups, strips, rows, listed]``, padded by no block."""
    after = sizes.strips * sizes.rows - index.shape[2]
    widths = [(0, 0), (0, 0), (0, after), (0, 0)]
    index = jnp.pad(index, widths, constant_values=blocks)
    return index.reshape(-1, sizes.strips, sizes.rows, sizes.listed)


class Places(NamedTuple):
    """For each unit of each batch entry: its lists, its key head, its batch entry."""

    lists: np.ndarray
    kv_head: np.ndarray
    batch: np.ndarray


def places(sizes: ListSizes) -> Places:
    """Where each unit finds its lists and its keys."""
    batch, unit = np.divmod(np.arange(sizes.batch * sizes.units), sizes.units)
    group = unit * sizes.groups // sizes.units
    head = unit * sizes.kv_heads // sizes.units
    entry = batch if sizes.lists > 1 else 0 * batch
    return Places(
        *(x.astype(np.int32) for x in (
            entry * sizes.groups + group, batch * sizes.kv_heads + head, batch
        ))
    )  # fmt: skip


class Listed(NamedTuple):
    """What a strip reads beside its queries."""

    at: Int32[Array, "rows listed"]  # the blocks; the last one, of 0, for no block
    shown: Bool[Array, "rows block_q 1 keys"]  # the pairs that attend
    seen: Bool[Array, "rows keys"]  # whether some query of the row sees the key


class UnitArrays(NamedTuple):
    """The arrays of one unit that do not depend on queries."""

    lists: Int32[Array, "strips rows listed"]
    q_vectors: tuple[Array, ...]  # [strips, rows, block_q]
    kv_vectors: tuple[Array, ...]  # [blocks, block_kv]


def listed(strip: Array, given: UnitArrays, sizes: ListSizes, call: ListCall) -> Listed:
    """The blocks of the lists of a strip, and which of their pairs attend."""
    lists = given.lists[strip]
    blocks = num_blocks(sizes.kv_seq_len, call.block_kv)
    real = (lists >= 0) & (lists < blocks)
    at = jnp.clip(lists, 0, blocks - 1)
    row = strip * sizes.rows + jnp.arange(sizes.rows, dtype=jnp.int32)
    q_ids = row[:, None] * call.block_q + _below(call.block_q)[None]
    k_ids = at[..., None] * call.block_kv + _below(call.block_kv)[None, None]
    inside = (k_ids < sizes.kv_seq_len) & real[..., None]
    flat = sizes.rows, 1, sizes.listed * call.block_kv
    q_vectors = tuple(x[strip][:, :, None] for x in given.q_vectors)
    kv_vectors = tuple(x[at].reshape(flat) for x in given.kv_vectors)
    args = q_ids[:, :, None], k_ids.reshape(flat), q_vectors, kv_vectors
    shown = call.predicate(0, *args, ()) & inside.reshape(flat)
    shown &= (q_ids < sizes.q_seq_len)[:, :, None]
    seen = jnp.any(shown, axis=1)
    some = jnp.any(seen.reshape(*at.shape, call.block_kv), axis=2)
    return Listed(jnp.where(some, at, blocks), shown[:, :, None], seen)


def _below(size: int) -> Int32[Array, " size"]:
    return jnp.arange(size, dtype=jnp.int32)


def taken(x: Array, found: Listed) -> Float[Array, "rows keys dim"]:
    """The listed rows of ``[blocks, block_kv, dim]``, 0 where no query looks."""
    flat = x.at[found.at].get(mode="promise_in_bounds")
    flat = flat.reshape(*found.seen.shape, x.shape[-1])
    if x.shape[1] == 1:
        return flat
    return jnp.where(found.seen[..., None], flat, jnp.zeros((), x.dtype))


def over_units(
    function: Callable[[UnitArrays, tuple, tuple], Any],
    queries: tuple,
    keys: tuple,
    vectors: Vectors,
    index: Array,
    sizes: ListSizes,
    call: ListCall,
) -> Any:
    """Runs ``function(given, queries, keys)`` for each unit, one after another.

    ``queries`` are from ``by_rows`` and ``keys`` from ``by_blocks``.
    """
    blocks = num_blocks(sizes.kv_seq_len, call.block_kv)
    lists = lists_by_rows(index, sizes, blocks)
    wide = sizes._replace(heads=1)
    q_vectors = tuple(by_rows(x, wide, call)[..., 0] for x in vectors.q)
    kv_vectors = tuple(by_blocks(x, call) for x in vectors.kv)
    spots = places(sizes)

    def of_unit(x: tuple) -> Any:
        own, at_lists, at_head, at_batch = x
        given = UnitArrays(
            lists[at_lists],
            tuple(v[jnp.minimum(at_batch, len(v) - 1)] for v in q_vectors),
            tuple(v[jnp.minimum(at_batch, len(v) - 1)] for v in kv_vectors),
        )
        return function(given, own, tuple(key[at_head] for key in keys))

    if len(spots.lists) == 1:
        own = tuple(x[0] for x in queries)
        found = of_unit((own, *(jnp.int32(x[0]) for x in spots)))
        return jax.tree.map(lambda x: x[None], found)
    return jax.lax.map(of_unit, (queries, *map(jnp.asarray, spots)))


def wide_inputs(inputs: Inputs) -> Inputs:
    """The inputs in the dtype of their sums."""
    return Inputs(*map(widened, inputs))
