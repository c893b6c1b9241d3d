"""What the kernels of rows share: the members of a row and the keys of its list."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import Vectors
from pallas_kernels.lists.call import ListCall
from pallas_kernels.lists.triton.launch import GatherSizes
from pallas_kernels.lists.triton.tiles import ListTile
from pallas_kernels.shared_values import Values
from pallas_kernels.triton.channels import Parts, parts_of
from pallas_kernels.triton.runs import along


class RowMembers(NamedTuple):
    """Some members of rows, int32 ``[n]``, and which of them are there."""

    query: Any
    head: Any  # of the unit
    inside: Any  # bool [n]


class Tested(NamedTuple):
    """The queries that the predicate tests, ``[n, 1]``: one for each member, or one."""

    query: jax.Array
    vectors: tuple[jax.Array, ...]
    inside: jax.Array


class Chunk(NamedTuple):
    """The gathered keys of a chunk, and which pairs attend."""

    k: Parts  # [keys, head_dim]
    v: jax.Array  # [keys, head_dim_v]
    pairs: jax.Array  # bool, broadcasts to [members, keys]


def iota(size: int) -> jax.Array:
    """``0 .. size - 1`` in int32."""
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def gather(
    ref: Any, at: tuple, inside: jax.Array, part: tuple[int, int] | None = None
) -> jax.Array:
    """``ref[*at]`` as ``[n, dim]``, with 0 where the bool ``inside [n]`` is false.

    ``part`` is the first of some channels and their number; None means all.
    """
    first, size = part or (0, ref.shape[-1])
    shape = inside.shape[0], size
    index = (jnp.broadcast_to(along(x, 0), shape) for x in at)
    columns = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to(along(inside, 0), shape)
    return plgpu.load(ref.at[*index, columns], mask=mask, other=0)


def gather_parts(
    ref: Any, at: tuple, inside: jax.Array, values: Values | None
) -> Parts:
    """``gather`` of queries or keys, in the parts of ``channels``."""
    parts = parts_of(ref.shape[-1], values)
    return tuple(gather(ref, at, inside, part) for part in parts)


def scatter_parts(
    ref: Any, at: tuple, inside: jax.Array, x: Parts, values: Values | None
) -> None:
    """``scatter`` of what ``gather_parts`` reads."""
    for (first, _), tile in zip(parts_of(ref.shape[-1], values), x, strict=True):
        scatter(ref, at, inside, tile, first)


def scatter(
    ref: Any, at: tuple, inside: jax.Array, x: jax.Array, first: int = 0
) -> None:
    """Writes ``x [n, dim]`` to the channels from ``first`` on of ``ref[*at]``.

    It writes where ``inside`` is true. No two places of ``at`` are equal, those outside
    included: the interpreter writes old values there.
    """
    index = (jnp.broadcast_to(along(i, 0), x.shape) for i in at)
    columns = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mask = jnp.broadcast_to(along(inside, 0), x.shape)
    plgpu.store(ref.at[*index, columns], x.astype(ref.dtype), mask=mask)


def numbers(ref: Any, at: tuple, inside: jax.Array, fill: float | int = 0) -> jax.Array:
    """``ref[*at]`` as ``[n]``, with ``fill`` where ``inside`` is false."""
    return plgpu.load(ref.at[*at], mask=inside, other=fill)


def scatter_numbers(ref: Any, at: tuple, inside: jax.Array, x: jax.Array) -> None:
    """``scatter`` of ``x [n]``."""
    plgpu.store(ref.at[*at], x, mask=inside)


def members_of(row: Any, place: jax.Array, sizes: GatherSizes) -> RowMembers:
    """The members at ``place`` of a row; both int32, scalar or ``[n]``."""
    heads = jnp.int32(sizes.heads)
    query = row * sizes.block_q + jax.lax.div(place, heads)
    inside = (place < sizes.members) & (query < sizes.q_seq_len)
    return RowMembers(query, jax.lax.rem(place, heads), inside)


def own_row(
    vectors: Vectors, sizes: GatherSizes, tile: ListTile
) -> tuple[RowMembers, Tested]:
    """The members of this program, all of a row or a part of it, and their queries."""
    program, count = pl.program_id(0), jnp.int32(tile.parts(sizes.members))
    row, part = jax.lax.div(program, count), jax.lax.rem(program, count)
    own = members_of(row, part * tile.fixed + iota(tile.fixed), sizes)
    query, inside = own.query, own.inside
    if sizes.block_q == 1:
        # All members have one query, so one test decides for all of them.
        query = jnp.broadcast_to(row, (1,))
        inside = query < sizes.q_seq_len
    read = (numbers(ref, (query,), inside) for ref in vectors.q)
    columns = tuple(along(x, 0) for x in read)
    return own, Tested(along(query, 0), columns, along(inside, 0))


def chunk_of_list(
    step: Any, tested: Tested, refs: tuple, vectors: Vectors, sizes: GatherSizes,
    tile: ListTile, call: ListCall,
) -> Chunk:  # fmt: skip
    """Gathers the chunk ``step`` of the list of this program's row.

    ``refs`` are those of the list, the keys and the values. Keys that no member sees
    are 0: they may hold NaN, whose product with 0 is NaN.
    """
    index_ref, k_ref, v_ref = refs
    place = step * tile.gathered + iota(tile.gathered)
    block_kv = jnp.int32(sizes.block_kv)
    entry = jax.lax.div(place, block_kv)
    block = numbers(index_ref, (entry,), entry < sizes.listed, -1)
    real = (block >= 0) & (block < sizes.blocks)
    # Only a real block is multiplied: any other may overflow.
    key = jnp.where(real, block, 0) * block_kv + jax.lax.rem(place, block_kv)
    real = real & (key < sizes.kv_seq_len)
    read = (numbers(ref, (key,), real) for ref in vectors.kv)
    kv_vectors = tuple(along(x, 1) for x in read)
    at = tested.query, along(key, 1), tested.vectors, kv_vectors
    pairs = call.predicate(0, *at, ()) & tested.inside & along(real, 1)
    seen = jnp.max(pairs.astype(jnp.int32), axis=0) > 0
    k = gather_parts(k_ref, (key,), seen, call.values)
    v = k[0] if call.values else gather(v_ref, (key,), seen)
    return Chunk(k, v, pairs)
