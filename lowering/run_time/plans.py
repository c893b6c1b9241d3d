"""Plans at run time: which blocks have pairs, given operands, segments and content.

The interval analysis of planning runs on the least and greatest value of every run-time
vector in each block, and on the bits of pairs. No single pair is evaluated, and the
shapes of arrays do not depend on the content. What depends on positions alone is
computed by NumPy (``host_first``). Kernel expressions fit 32 bits with a margin
(``narrow``), so their bounds fit as well, whatever values a vector has.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lowering import ir
from lowering.host_first import HOST_FIRST as xp
from lowering.host_first import is_known
from lowering.pipeline import Stages, block_mask
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.verdicts import Analysis
from lowering.run_time.pair_bits import held_in_blocks
from pallas_kernels.block_mask import (
    EMPTY,
    FULL,
    PARTIAL,
    Axis,
    BlockMask,
    expand,
    from_blocks,
)
from pallas_kernels.call import Masks, Vectors
from pallas_kernels.config import Tile, Tiles

# A constant table in the program has at most so many blocks, a byte each.
MOST_BLOCKS = 1 << 20


def is_run_time(stages: Stages) -> bool:
    """Whether the visited blocks depend on run-time arrays."""
    return any(map(ir.operand_names, stages.planned.maps))


def masks(stages: Stages, tiles: Tiles, vectors: Vectors) -> Masks:
    """The traced plans of the three kernels, for each batch entry and head."""
    made: dict[tuple[int, int, Axis], BlockMask] = {}

    def of(tile: Tile, by: Axis) -> BlockMask:
        key = tile.block_q, tile.block_kv, by
        if key not in made:
            made[key] = plan(stages, tile.block_q, tile.block_kv, vectors, by)
        return made[key]

    return Masks(of(tiles.forward, "q"), of(tiles.dq, "q"), of(tiles.dkv, "kv"))


class Owners(NamedTuple):
    """The map of each head of each batch entry, and the predicate of each map."""

    map_of_head: np.ndarray  # [heads], or [batch * heads]
    test_of_map: np.ndarray


def plan(
    stages: Stages,
    block_q: int,
    block_kv: int,
    vectors: Vectors,
    by: Axis,
    present: Bool[Array, "batch blocks"] | None = None,
) -> BlockMask:
    """The plan for given vectors and bits: the blocks that may hold a pair.

    Key blocks of a batch entry that are not ``present`` are not visited.
    """
    program = stages["hoist"]
    static = block_mask(stages, block_q, block_kv, "q")
    capacity = static if by == "q" else block_mask(stages, block_q, block_kv, "kv")
    if not static.max_blocks:
        return capacity
    tables = _tables(static)
    kinds, batches, heads = [], [], []
    for m, node in enumerate(program.maps):
        mine = [h for h, i in enumerate(program.map_of_head) if i == m]
        known = _of_heads(vectors, mine)
        found = _within_static(_kinds(node, static, known), static, tables[m])
        if present is not None:
            found = jnp.where(present[:, None, None], found, jnp.int8(EMPTY))
        kinds.append(found.reshape(-1, *found.shape[2:]))
        batches.append(found.shape[0])
        heads.append(found.shape[1])
    owners = _owners(program.map_of_head, batches, heads)
    table = xp.concatenate(kinds)
    if by == "kv":
        table = xp.swapaxes(table, 1, 2)
    if is_known(table):
        # The plan does not depend on the content after all.
        found = from_blocks(table, map_of_head=owners.map_of_head, like=capacity)
        return replace(found, test_of_map=owners.test_of_map)
    return from_kinds(table, owners, capacity)


def _of_heads(vectors: Vectors, heads: list[int]) -> Vectors:
    """The vectors and bits of some heads."""
    at = np.array(heads)

    def pick(x: jax.Array) -> jax.Array:
        return x if x.shape[1] == 1 or len(at) == x.shape[1] else x[:, at]

    bits = tuple(replace(x, words=pick(x.words)) for x in vectors.bits)
    q, kv = (tuple(pick(x) for x in side) for side in vectors[:2])
    return Vectors(q, kv, bits)


def _kinds(node: ir.Pred, static: BlockMask, vectors: Vectors) -> Any:
    """The kind of every block, int8 ``[batch or 1, heads or 1, rows, columns]``."""
    block_q, block_kv = static.block_q, static.block_kv
    q = (_part(x, static) for x in _ends(static.q_seq_len, block_q))
    k = (_part(x, static) for x in _ends(static.kv_seq_len, block_kv))
    at = Rectangles(
        *(x[None, None, :, None] for x in q), *(x[None, None, None] for x in k)
    )
    known = _known(node, vectors, static)
    found = Analysis(Ranges(at, xp=xp, operands=known))(node)
    empty, partial, full = (np.int8(kind) for kind in (EMPTY, PARTIAL, FULL))
    kinds = xp.where(found.all, full, xp.where(found.none, empty, partial))
    blocks = static.num_rows, static.num_columns
    shape = np.broadcast_shapes(np.shape(kinds), (1, 1, *blocks))
    return xp.broadcast_to(kinds, shape)


def _ends(length: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last position of every block."""
    first = np.arange(0, length, block, dtype=np.int32)
    return first, np.minimum(first + block, length) - 1


def _known(
    node: ir.Pred, vectors: Vectors, static: BlockMask
) -> Mapping[ir.Operand | ir.Hoisted | ir.HoistedBits, tuple]:
    """The ranges of hoisted vectors and bits in each block."""
    found: dict[ir.Operand | ir.Hoisted | ir.HoistedBits, tuple] = {}
    for part in set(ir.walk(node)):
        match part:
            case ir.Hoisted("q", slot):
                ends = _extremes(vectors.q[slot], static.block_q)
                found[part] = tuple(x[:, :, :, None] for x in ends)
            case ir.Hoisted("k", slot):
                ends = _extremes(vectors.kv[slot], static.block_kv)
                found[part] = tuple(x[:, :, None, :] for x in ends)
            case ir.HoistedBits(slot):
                found[part] = held_in_blocks(
                    vectors.bits[slot], static.block_q, static.q_seq_len
                )
    return found


def _extremes(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and greatest value in every block."""
    short = -x.shape[-1] % block
    x = jnp.pad(x, ((0, 0), (0, 0), (0, short)), mode="edge")
    x = x.reshape(*x.shape[:2], -1, block)
    return x.min(axis=-1), x.max(axis=-1)


def _is_large(static: BlockMask) -> bool:
    """Whether a table of the blocks is too large to be a part of the program."""
    return static.num_rows * static.num_columns > MOST_BLOCKS


def _part(x: np.ndarray, static: BlockMask) -> Any:
    """Static rows or columns of which a table is made.

    A small table is made while the call is traced. A large one is made at run time: the
    barrier keeps XLA from folding it into a constant.
    """
    return jax.lax.optimization_barrier(jnp.asarray(x)) if _is_large(static) else x


def _tables(static: BlockMask) -> Any:
    """The kind of every block in the static plan, int8 ``[maps, rows, columns]``."""
    if not _is_large(static):
        return expand(static)
    rows = static.num_maps * static.num_rows
    row = np.repeat(np.arange(rows, dtype=np.int32), np.diff(static.row_ptr))
    kind = np.where(static.run_full != 0, FULL, PARTIAL).astype(np.int8)
    runs = row, static.run_start, static.run_stop, kind
    row, start, stop, kind = (_part(x, static) for x in runs)
    steps = jnp.zeros((rows, static.num_columns + 1), jnp.int8)
    steps = steps.at[row, start].add(kind).at[row, stop].add(-kind)
    tables = jnp.cumsum(steps, axis=1, dtype=jnp.int8)[:, :-1]
    return tables.reshape(static.num_maps, static.num_rows, static.num_columns)


def _within_static(kinds: Any, static: BlockMask, table: Any) -> Any:
    """``kinds`` where the static plan has a partial block, else the static kind.

    ``table`` is the static plan of one map.
    """
    known = is_known(table)
    if static.kv_seq_len % static.block_kv:
        # A block that extends beyond the last key is never full.
        last = np.arange(static.num_kv_blocks) == static.num_kv_blocks - 1
        most = np.where(last, PARTIAL, FULL).astype(np.int8)
        kinds = xp.minimum(kinds, most[None, None, None])
    for kind in (FULL, EMPTY):
        if not known or (table == kind).any():
            kinds = xp.where((table == kind)[None, None], np.int8(kind), kinds)
    return kinds


def _owners(map_of_head: tuple[int, ...], batches: list, heads: list) -> Owners:
    first = np.concatenate([[0], np.cumsum(np.array(batches) * np.array(heads))])
    batch = max(batches)
    found = np.zeros((batch, len(map_of_head)), np.int32)
    seen = dict.fromkeys(map_of_head, 0)
    for h, m in enumerate(map_of_head):
        of_batch = np.arange(batch) if batches[m] > 1 else np.zeros(batch, int)
        of_head = seen[m] if heads[m] > 1 else 0
        found[:, h] = first[m] + of_batch * heads[m] + of_head
        seen[m] += 1
    tests = np.repeat(np.arange(len(batches)), np.array(batches) * np.array(heads))
    return Owners(found.reshape(-1), tests.astype(np.int32))


def from_kinds(kinds: jax.Array, owners: Owners, like: BlockMask) -> BlockMask:
    """A plan from a traced table of kinds, int8 ``[maps, rows, columns]``.

    Its capacities are those of ``like``, whose blocks include all that are visited.
    """
    maps, rows, columns = kinds.shape
    flat = kinds.reshape(maps * rows, columns)
    edge = jnp.zeros((len(flat), 1), flat.dtype)
    before = jnp.concatenate([edge, flat[:, :-1]], axis=1)
    after = jnp.concatenate([flat[:, 1:], edge], axis=1)
    opens = (flat != before) & (flat != EMPTY)
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    # A run ends where the kind changes for the next time.
    ends = jnp.where(flat != after, column, columns)
    stop = jax.lax.cummin(ends, axis=1, reverse=True) + 1
    count = jnp.sum(opens, axis=1, dtype=jnp.int32)
    row_ptr = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)]
    )
    max_runs = max(1, like.max_blocks)
    capacity = len(flat) * max_runs
    slot = row_ptr[:-1, None] + jnp.cumsum(opens, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(opens, slot, capacity)

    def listed(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, flat.shape).astype(jnp.int32)
        return jnp.zeros(capacity, jnp.int32).at[slot].set(x, mode="drop")

    return replace(
        like,
        row_ptr=row_ptr.astype(jnp.int32),
        run_start=listed(column),
        run_stop=listed(stop),
        run_full=listed(flat == FULL),
        map_of_head=owners.map_of_head,
        test_of_map=owners.test_of_map,
        num_maps=maps,
        max_runs=max_runs,
    )
