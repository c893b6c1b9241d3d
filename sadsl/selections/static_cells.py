"""Finds the cells that hold a pair of a static map, from its expression."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lowering import ir, pipeline
from lowering.expr import heads
from lowering.expr.fits import bounded, known_of
from lowering.expr.simplify import simplify
from lowering.expr.static_range import Known
from lowering.problem import Problem
from lowering.run_time.vectors import AtPositions, evaluate_outside
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.loops import repeat
from sadsl.maps.base import IndexMap
from sadsl.selections.tiles import (
    GridTiles,
    Partition,
    WithinPart,
    num_parts,
    part_of,
    positions,
)

# The number of pairs that are evaluated in one step, where a partition is tiles.
STEP = 1 << 20
# A table of cells of so many pairs takes no more memory than the bits of these pairs.
COARSE = 8


def check_static(map_name: str, name: str, value: IndexMap | None) -> None:
    """Checks that an argument is None or a map of positions alone.

    Raises:
      TypeError: it is not an index map.
      ValueError: it reads run-time arrays or depends on content.
    """
    if value is None:
        return
    if not isinstance(value, IndexMap):
        raise TypeError(f"{map_name}: {name}={value!r} must be an index map or None")
    names = sorted(ir.operand_names(value.node))
    if names:
        raise ValueError(
            f"{map_name}: {name}={value!r} reads the run-time arrays {names}, but it "
            "must be a map of positions alone: combine the maps by & or | instead"
        )


def holding(
    a: IndexMap, rows: Partition, columns: Partition, problem: Problem
) -> Bool[Array, "heads_or_1 rows columns"]:
    """The cells that hold at least one pair of ``a``, exactly.

    Cells of blocks are read off the plan of the map; in cells of tiles, every pair is
    evaluated.

    Raises:
      ValueError: the map does not fit the problem (heads, tables, grids).
    """
    if rows == 1 and isinstance(a, WithinPart) and a.partition == columns:
        return _own(columns, problem)
    if isinstance(rows, GridTiles) or isinstance(columns, GridTiles):
        return _looked_into(a, rows, columns, problem)
    stages = pipeline.run(a.node, problem)
    mask = pipeline.block_mask(stages, rows, columns, "q", True)
    found = _expanded(mask)
    whose = np.asarray(mask.map_of_head)
    return found if mask.num_maps == 1 else found[whose]


def _own(columns: Partition, problem: Problem) -> Bool[Array, "1 rows columns"]:
    """The cells of ``within(columns)``, a row for each query."""
    at = np.arange(problem.q_seq_len) + problem.q_offset
    _, real = positions(columns, problem.kv_seq_len)
    mine = jnp.asarray(part_of(columns, at).astype(np.int32))
    part = jnp.arange(len(real), dtype=jnp.int32)
    return (mine[:, None] == part[None, :])[None]


def _expanded(mask: BlockMask) -> Bool[Array, "maps rows columns"]:
    """The blocks of a plan as bools, computed on the device from its runs."""
    ptr = np.asarray(mask.row_ptr)
    length = np.diff(ptr)
    most = max(1, int(length.max(initial=0)))
    slot = np.arange(most)
    held = slot < length[:, None]
    at = np.minimum(ptr[:-1, None] + slot, max(0, len(mask.run_start) - 1))
    ends = np.zeros((2, *held.shape), np.int32)
    if len(mask.run_start):
        runs = np.stack([np.asarray(mask.run_start), np.asarray(mask.run_stop)])
        ends = np.where(held, runs[:, at], 0).astype(np.int32)
    start, stop = jnp.asarray(ends)
    column = jnp.arange(mask.num_columns, dtype=jnp.int32)[None]

    def add(i: Int[Array, ""], found: Bool[Array, "r c"]) -> Bool[Array, "r c"]:
        low, high = (jax.lax.dynamic_slice_in_dim(x, i, 1, 1) for x in (start, stop))
        return found | (column >= low) & (column < high)

    none = jnp.zeros((len(length), mask.num_columns), bool)
    found = repeat(most, add, none)
    return found.reshape(mask.num_maps, -1, mask.num_columns)


def of_heads(a: IndexMap, problem: Problem) -> tuple[ir.Pred, ...]:
    """The predicate of each head, or of one head if all have the same."""
    node = ir.substitute(a.node, {"n": ir.Const(problem.kv_seq_len)})
    every, known = heads.per_head(node, problem.num_heads), _known(problem)
    nodes = tuple(bounded(simplify(node), known) for node in every)
    return nodes[:1] if len(set(nodes)) == 1 else nodes


def pairs_at(
    nodes: tuple[ir.Pred, ...],
    q: Int[Array, "..."],
    k: Int[Array, "..."],
    problem: Problem,
) -> Bool[Array, "..."]:
    """Evaluates predicates at positions that broadcast; the first axis is by node."""
    zero = jnp.zeros((1,) * max(q.ndim, k.ndim), jnp.int32)
    shape = jnp.broadcast_shapes(q.shape, k.shape)
    at, known = AtPositions(q, k, h=zero, operands={}), _known(problem)
    found = [evaluate_outside(node, at, known) for node in nodes]
    return jnp.stack([jnp.broadcast_to(x, shape) for x in found])


def _known(problem: Problem) -> Known:
    return known_of(problem.q_offset + problem.q_seq_len, problem.kv_seq_len)


def _looked_into(
    a: IndexMap, rows: Partition, columns: Partition, problem: Problem
) -> Bool[Array, "heads_or_1 rows columns"]:
    """``holding`` by evaluating every pair, some rows of cells at a time."""
    nodes = of_heads(a, problem)
    q, q_real = positions(rows, problem.q_seq_len)
    k, k_real = positions(columns, problem.kv_seq_len)
    key, keys_real = jnp.asarray(k, jnp.int32)[None], jnp.asarray(k_real)[None]
    step = max(1, STEP // (q.shape[1] * k.size))

    def look(at: tuple[Array, Array]) -> Bool[Array, "nodes columns"]:
        query, real = at
        held = pairs_at(nodes, query[:, None, None] + problem.q_offset, key, problem)
        held &= (real[:, None, None] & keys_real)[None]
        return jnp.any(held, axis=(1, 3))

    found = jax.lax.map(
        look, (jnp.asarray(q, jnp.int32), jnp.asarray(q_real)), batch_size=step
    )
    return jnp.moveaxis(found, 0, 1)


def held_at(
    a: IndexMap,
    row: Int[Array, " rows"],
    sizes: tuple[int, int],
    columns: tuple[int, int],
    problem: Problem,
) -> Bool[Array, "heads_or_1 rows columns"]:
    """``holding`` for some rows and a range of columns, by evaluating every pair.

    ``sizes`` are those of a block of queries and of a block of keys.
    """
    block_q, block = sizes
    q = row[:, None] * block_q + jnp.arange(block_q, dtype=jnp.int32)[None]
    q = jnp.minimum(q, problem.q_seq_len - 1) + problem.q_offset
    key = np.arange(columns[0] * block, columns[1] * block)
    real = (key < problem.kv_seq_len)[None, None, None]
    k = jnp.asarray(np.minimum(key, problem.kv_seq_len - 1), jnp.int32)
    nodes = of_heads(a, problem)
    held = pairs_at(nodes, q[:, :, None], k[None, None], problem)
    held = jnp.any(held & real, axis=2)
    return held.reshape(*held.shape[:2], -1, block).any(axis=3)


class StaticCells:
    """The cells that hold a pair of a static map, for some rows at a time.

    A table of coarse cells is made once, unless ``coarse`` is False. A table of fine
    cells would take a byte for each pair, so they are evaluated for the rows that are
    asked for.
    """

    def __init__(
        self,
        a: IndexMap,
        rows: Partition,
        columns: Partition,
        problem: Problem,
        *,
        coarse: bool = True,
    ) -> None:
        self._map, self._problem = a, problem
        self._rows, self._columns, self._table = rows, columns, None
        tiles = isinstance(rows, GridTiles) or isinstance(columns, GridTiles)
        if tiles or (coarse and rows * columns >= COARSE):
            self._table = holding(a, rows, columns, problem)

    def at(self, row: Int[Array, " rows"]) -> Bool[Array, "1 heads_or_1 rows columns"]:
        """The cells of some rows."""
        if self._table is not None:
            return self._table[None, :, row]
        assert isinstance(self._rows, int)
        assert isinstance(self._columns, int)
        sizes = self._rows, self._columns
        count = num_parts(self._columns, self._problem.kv_seq_len)
        return held_at(self._map, row, sizes, (0, count), self._problem)[None]


def heads_of(*maps: IndexMap | None) -> int:
    """The least number of heads that fits all of the maps."""
    sizes = [
        len(n.terms)
        for a in maps
        if a is not None
        for n in ir.walk(a.node)
        if isinstance(n, ir.ByHead)
    ]
    return math.lcm(*sizes)
