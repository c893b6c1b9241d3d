"""Plans that are made at run time: which blocks operands, segments and content leave.

The same bounds as in planning, in jnp, over the least and greatest of every run-time
vector in each block and over the bits of pairs: no pair is looked at, and whatever the
content, the arrays have one shape.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowering import ir
from lowering.bits import held_in_blocks
from lowering.bounds import Analysis
from lowering.pipeline import Stages, block_mask
from lowering.ranges import ANYTHING_32, Ranges, Rectangles
from pallas_kernels.block_mask import EMPTY, FULL, PARTIAL, Axis, BlockMask
from pallas_kernels.call import Masks, Vectors
from pallas_kernels.config import Tile, Tiles

# Values up to this are bounded, others are taken as unknown: sums stay in 32 bits.
KNOWN = 1 << 24
# A greater factor of a run-time value could overflow: its blocks are all looked at.
MOST_FACTOR = 8


def is_run_time(stages: Stages) -> bool:
    """Whether what is visited depends on run-time arrays."""
    return any(map(ir.operand_names, stages.planned.maps))


def masks(stages: Stages, tiles: Tiles, vectors: Vectors) -> Masks:
    """The plans of the three kernels, traced: one for each batch entry and head."""
    made: dict[tuple[int, int, Axis], BlockMask] = {}

    def of(tile: Tile, by: Axis) -> BlockMask:
        key = tile.block_q, tile.block_kv, by
        if key not in made:
            made[key] = plan(stages, tile.block_q, tile.block_kv, vectors, by)
        return made[key]

    return Masks(of(tiles.forward, "q"), of(tiles.dq, "q"), of(tiles.dkv, "kv"))


class Owners(NamedTuple):
    """Which map of the plan each head of each batch entry has, and what it tests."""

    map_of_head: np.ndarray  # [heads], or [batch * heads]
    test_of_map: np.ndarray


def plan(
    stages: Stages, block_q: int, block_kv: int, vectors: Vectors, by: Axis
) -> BlockMask:
    """The blocks that hold a pair for the vectors and bits at hand."""
    program = stages["hoist"]
    static = block_mask(stages, block_q, block_kv, "q")
    capacity = static if by == "q" else block_mask(stages, block_q, block_kv, "kv")
    if not static.max_blocks:
        return capacity
    kinds, batches, heads = [], [], []
    for m, node in enumerate(program.maps):
        mine = [h for h, i in enumerate(program.map_of_head) if i == m]
        known = _of_heads(vectors, mine)
        found = _within_static(_kinds(node, static, known), static, m)
        kinds.append(found.reshape(-1, *found.shape[2:]))
        batches.append(found.shape[0])
        heads.append(found.shape[1])
    owners = _owners(program.map_of_head, batches, heads)
    table = jnp.concatenate(kinds)
    if by == "kv":
        table = jnp.swapaxes(table, 1, 2)
    return from_kinds(table, owners, capacity)


def _of_heads(vectors: Vectors, heads: list[int]) -> Vectors:
    """The vectors and bits of some heads."""
    at = np.array(heads)

    def pick(x: jax.Array) -> jax.Array:
        return x if x.shape[1] == 1 or len(at) == x.shape[1] else x[:, at]

    bits = tuple(replace(x, words=pick(x.words)) for x in vectors.bits)
    q, kv = (tuple(pick(x) for x in side) for side in vectors[:2])
    return Vectors(q, kv, bits)


def _is_bounded(node: ir.Pred) -> bool:
    """Whether 32 bits hold the bounds of every comparison."""
    products = [n for n in ir.walk(node) if isinstance(n, ir.Mul)]
    return all(
        abs(n.factor) <= MOST_FACTOR
        or not any(isinstance(x, ir.Hoisted) for x in ir.walk(n))
        for n in products
    )


def _kinds(node: ir.Pred, static: BlockMask, vectors: Vectors) -> jax.Array:
    """The kind of every block, int32 ``[batch or 1, heads or 1, rows, columns]``."""
    if not _is_bounded(node):
        return jnp.full((1, 1, 1, 1), PARTIAL, jnp.int32)
    block_q, block_kv = static.block_q, static.block_kv
    q = _ends(static.q_seq_len, block_q)
    k = _ends(static.kv_seq_len, block_kv)
    at = Rectangles(
        *(x[None, None, :, None] for x in q), *(x[None, None, None] for x in k)
    )
    known = _known(node, vectors, static)
    found = Analysis(Ranges(at, xp=jnp, operands=known))(node)
    shape = jnp.broadcast_shapes(
        jnp.shape(found.none), jnp.shape(found.all), (1, 1, len(q[0]), len(k[0]))
    )
    kinds = jnp.where(found.all, FULL, jnp.where(found.none, EMPTY, PARTIAL))
    return jnp.broadcast_to(kinds.astype(jnp.int32), shape)


def _ends(length: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The first and the last position of every block."""
    first = np.arange(0, length, block, dtype=np.int32)
    return jnp.asarray(first), jnp.asarray(np.minimum(first + block, length) - 1)


def _known(
    node: ir.Pred, vectors: Vectors, static: BlockMask
) -> Mapping[ir.Operand | ir.Hoisted | ir.HoistedBits, tuple]:
    """What is known of everything hoisted in a block."""
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
    """The least and greatest value in every block, where 32 bits can add them up."""
    short = -x.shape[-1] % block
    x = jnp.pad(x, ((0, 0), (0, 0), (0, short)), mode="edge")
    x = x.reshape(*x.shape[:2], -1, block)
    low, high = x.min(axis=-1), x.max(axis=-1)
    known = (low >= -KNOWN) & (high <= KNOWN)
    return jnp.where(known, low, -ANYTHING_32), jnp.where(known, high, ANYTHING_32)


def _within_static(kinds: jax.Array, static: BlockMask, m: int) -> jax.Array:
    """``kinds`` where the static plan of map ``m`` leaves a block open."""
    visited, full = (_spread(static, m, full=x)[None, None] for x in (None, True))
    if static.kv_seq_len % static.block_kv:
        last = np.arange(static.num_kv_blocks) == static.num_kv_blocks - 1
        kinds = jnp.where(last[None, None, None], jnp.minimum(kinds, PARTIAL), kinds)
    return jnp.where(full, FULL, jnp.where(visited, kinds, EMPTY))


def _spread(static: BlockMask, m: int, *, full: bool | None) -> jax.Array:
    """The blocks of one map as bools ``[rows, columns]``, from its runs."""
    rows = np.repeat(
        np.arange(static.num_maps * static.num_rows), np.diff(static.row_ptr)
    )
    mine = rows // static.num_rows == m
    if full is not None:
        mine &= (static.run_full != 0) == full
    row = rows[mine] % static.num_rows
    edges = jnp.zeros((static.num_rows, static.num_columns + 1), jnp.int32)
    edges = edges.at[row, static.run_start[mine]].add(1)
    edges = edges.at[row, static.run_stop[mine]].add(-1)
    return jnp.cumsum(edges, axis=1)[:, :-1] > 0


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
    """Runs of a traced table of kinds ``[maps, rows, columns]``.

    The capacities are those of ``like``, whose blocks hold all that are visited.
    """
    maps, rows, columns = kinds.shape
    flat = kinds.reshape(maps * rows, columns)
    edge = jnp.zeros((len(flat), 1), flat.dtype)
    before = jnp.concatenate([edge, flat[:, :-1]], axis=1)
    after = jnp.concatenate([flat[:, 1:], edge], axis=1)
    opens = (flat != before) & (flat != EMPTY)
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    # A run ends where the kind changes next.
    ends = jnp.where(flat != after, column, columns)
    stop = jax.lax.cummin(ends, axis=1, reverse=True) + 1
    count = jnp.sum(opens, axis=1, dtype=jnp.int32)
    row_ptr = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count)])
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
