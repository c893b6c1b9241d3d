"""Converts block masks to walks: on the host, or in JAX if the runs are traced."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Masks
from pallas_kernels.xla.walk_types import Chunks, Long, Short, Walk, XlaLists, XlaPlan

# The number of keys that one step processes. A row of up to SHORT keys takes one
# softmax. A longer row is processed CHUNK keys at a time, so its scores stay in cache.
SHORT = 2048
CHUNK = 1024
# The same for a traced row, which has more padding.
TRACED_CHUNK = 512

# Each loop is code to compile: a table of short rows is one loop, chunks are two, of
# full and of partial blocks. A loop must save this fraction of all blocks.
WORTH_A_LOOP = 0.05

# The fixed cost of a chunk, in units of the cost of a block.
CHUNK_OVERHEAD = 1


def prepare(masks: Masks, call: Call, inputs: Inputs) -> XlaLists:
    """The plans of a call, which depend on its masks alone."""
    del call, inputs
    return lists_of(masks)


def lists_of(masks: Masks) -> XlaLists:
    """The plans of some masks. The backward pass takes the rows of ``masks.dq``."""
    forward = plan(masks.forward)
    backward = forward if masks.dq is masks.forward else plan(masks.dq)
    maps = head_maps(masks.forward)
    return XlaLists(forward, backward, maps, head_tests(masks.forward))


def head_maps(mask: BlockMask) -> tuple[int, ...]:
    """The map of every head, which must be known when the call is traced.

    Raises:
      NotImplementedError: it is traced.
    """
    (num_heads,) = mask.map_of_head.shape
    if mask.num_maps == 1:
        return (0,) * num_heads
    if isinstance(mask.map_of_head, jax.core.Tracer):
        raise NotImplementedError(
            "map_of_head is traced: impl='xla' must know the map of every head when "
            "the call is traced; pass a NumPy array"
        )
    return tuple(np.asarray(mask.map_of_head).tolist())


def head_tests(mask: BlockMask) -> tuple[int, ...]:
    """The number of the predicate's test of every map."""
    tests = mask.test_of_map
    tests = range(mask.num_maps) if tests is None else np.asarray(tests)
    return tuple(int(t) for t in tests)


def plan(mask: BlockMask) -> XlaPlan:
    """The walks of all maps of a mask with ``by="q"``."""
    arrays = (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        slots = max(1, min(mask.max_blocks, TRACED_CHUNK // mask.block_kv))
        walks = (traced_walk(mask, slots),)
    else:
        walks = host_walks(mask)
    return XlaPlan(walks, mask.block_q, mask.block_kv)


class HostBlocks:
    """All full or all partial blocks of a mask, row after row, on the host."""

    def __init__(self, mask: BlockMask, *, full: bool) -> None:
        ptr, start, stop, kind = (
            np.asarray(x)
            for x in (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
        )
        rows = len(ptr) - 1
        keep = (kind != 0) == full
        start, length = start[keep], (stop - start)[keep]
        run_row = np.repeat(np.arange(rows), np.diff(ptr))[keep]
        before = np.cumsum(length) - length
        total = int(length.sum())
        self.block = np.repeat(start - before, length) + np.arange(total)
        self.count = np.bincount(run_row, weights=length, minlength=rows).astype(int)
        self.begin = np.cumsum(self.count) - self.count

    def table(self, rows: np.ndarray, slots: int) -> np.ndarray:
        """The blocks of ``rows``, padded with -1 to ``slots`` columns."""
        slot = np.arange(slots)
        real = slot < self.count[rows][:, None]
        at = np.where(real, self.begin[rows][:, None] + slot, 0)
        return np.where(real, self.block[at], -1) if self.block.size else at - 1

    def chunks(self, rows: np.ndarray, most: int) -> Chunks:
        """The blocks of ``rows`` in chunks of at most ``most`` blocks."""
        count = self.count[rows]
        slots = chunk_slots(count, most)
        of_row = -(-count // slots)
        end = np.cumsum(of_row)
        at = np.arange(end[-1]) - np.repeat(end - of_row, of_row)
        left = np.repeat(count, of_row) - at * slots
        real = np.minimum(left, slots)
        slot = np.minimum(np.arange(slots), real[:, None] - 1)
        first = np.repeat(self.begin[rows], of_row) + at * slots
        block = self.block[first[:, None] + slot]
        if not len(block):
            # A table must not be empty, although no row points into it.
            block, real = np.zeros((1, slots), int), np.zeros(1, int)
        return Chunks(*map(int32, (block, real, end - of_row, end)))


def int32(x: np.ndarray) -> Int32[np.ndarray, "..."]:
    """Indices as int32, the dtype on the device."""
    return x.astype(np.int32)


def chunk_slots(count: np.ndarray, most: int) -> int:
    """The chunk size with the least cost for rows of ``count`` blocks, ``[rows]``."""
    return _best_chunks(count, most)[1]


def _best_chunks(count: np.ndarray, most: int) -> tuple[int, int]:
    """The least cost of rows of ``count`` blocks in chunks, and the chunk size."""
    sizes = np.arange(1, max(1, min(most, count.max(initial=1))) + 1)
    cost = (-(-count[:, None] // sizes)).sum(axis=0) * (sizes + CHUNK_OVERHEAD)
    at = int(np.argmin(cost))
    return int(cost[at]), int(sizes[at])


class Split(NamedTuple):
    """The indices of the rows in the table of short rows, and of those in chunks."""

    short: np.ndarray
    long: np.ndarray


def split(
    full: np.ndarray, partial: np.ndarray, block_kv: int, limits: tuple[int, int]
) -> Split:
    """Splits rows that visit some block, to minimise padding and the number of loops.

    ``full`` and ``partial`` are the numbers of such blocks of each row, ``[rows]``, and
    ``limits`` are the keys of the longest short row and of the longest chunk. Rows that
    are short go into a table as wide as the longest of them, or into chunks too.
    """
    total = full + partial
    some, most = total > 0, max(1, limits[1] // block_kv)
    short = some & (total <= limits[0] // block_kv)
    worth = WORTH_A_LOOP * float(total.sum())

    def cost(short: np.ndarray) -> float:
        long, found = some & ~short, 0.0
        if short.any():
            width = full[short].max() + partial[short].max()
            found += float(short.sum() * width) + worth
        if long.any():
            chunks = (_best_chunks(count[long], most)[0] for count in (full, partial))
            found += sum(chunks) + 2 * worth
        return found

    chosen = min(short, np.zeros_like(short), key=cost)
    return Split(np.flatnonzero(chosen), np.flatnonzero(some & ~chosen))


def host_walks(mask: BlockMask) -> tuple[Walk, ...]:
    """The walk of every map, with its rows split into short and long ones."""
    full, partial = HostBlocks(mask, full=True), HostBlocks(mask, full=False)

    def walk(index: int) -> Walk:
        rows = np.arange(mask.num_rows) + index * mask.num_rows
        near, far = split(
            full.count[rows], partial.count[rows], mask.block_kv, (SHORT, CHUNK)
        )
        short = (short_rows(rows[near], full, partial, mask),) if near.size else ()
        long = long_rows(rows[far], full, partial, mask) if far.size else None
        return Walk(short, long)

    return tuple(walk(index) for index in range(mask.num_maps))


def short_rows(
    rows: np.ndarray, full: HostBlocks, partial: HostBlocks, mask: BlockMask
) -> Short:
    """One table of ``rows``, as wide as the longest row."""
    num_full, num_partial = full.count[rows], partial.count[rows]
    slots = int(num_full.max()), int(num_partial.max())
    block = np.concatenate(
        [full.table(rows, slots[0]), partial.table(rows, slots[1])], axis=1
    )
    own = block.max(axis=1, keepdims=True)
    block = np.where(block < 0, own, block)
    arrays = map(int32, (rows % mask.num_rows, block, num_full, num_partial))
    return Short(*arrays, full_slots=slots[0])


def long_rows(
    rows: np.ndarray, full: HostBlocks, partial: HostBlocks, mask: BlockMask
) -> Long:
    """The chunks of ``rows``."""
    most = max(1, CHUNK // mask.block_kv)
    chunks = full.chunks(rows, most), partial.chunks(rows, most)
    return Long(int32(rows % mask.num_rows), *chunks)


def traced_walk(mask: BlockMask, slots: int) -> Walk:
    """The rows of every map in chunks of ``slots`` blocks; runs in JAX.

    Every array has an axis of maps in front.
    """
    if not mask.max_blocks:
        return Walk((), None)
    rows = jnp.arange(mask.num_rows, dtype=jnp.int32)

    def walk(index: jax.Array) -> Walk:
        at = rows + index * mask.num_rows
        full, partial = (_chunks(mask, at, slots, full=x) for x in (True, False))
        return Walk((), Long(rows, full, partial))

    return jax.vmap(walk)(jnp.arange(mask.num_maps, dtype=jnp.int32))


def _chunks(mask: BlockMask, rows: jax.Array, slots: int, *, full: bool) -> Chunks:
    """The blocks of one kind of ``rows``, in as many chunks as ``max_blocks`` needs."""
    ptr, start, stop, kind = (
        jnp.asarray(x)
        for x in (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
    )
    per_row = -(-mask.max_blocks // slots)
    run = ptr[rows][:, None] + jnp.arange(mask.max_runs, dtype=jnp.int32)[None, :]
    inside = run < ptr[rows + 1][:, None]
    run = jnp.where(inside, run, 0)
    length = jnp.where(inside & ((kind[run] != 0) == full), (stop - start)[run], 0)
    end = jnp.cumsum(length, axis=1, dtype=jnp.int32)
    count = end[:, -1]

    slot = jnp.arange(per_row * slots, dtype=jnp.int32)[None, :]
    slot = jnp.clip(slot, 0, jnp.maximum(count - 1, 0)[:, None])
    # The run that contains a slot is the first whose end is greater than the slot.
    holder = jax.vmap(lambda e, s: jnp.searchsorted(e, s, side="right"))(end, slot)
    holder = jnp.minimum(holder, mask.max_runs - 1)

    def of_holder(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, holder, axis=1)

    block = of_holder(start[run]) + slot - of_holder(end - length)
    begin = jnp.arange(len(rows), dtype=jnp.int32) * per_row
    chunk = jnp.arange(per_row, dtype=jnp.int32) * slots
    real = jnp.clip(count[:, None] - chunk[None, :], 0, slots)
    return Chunks(
        block.reshape(-1, slots).astype(jnp.int32),
        real.reshape(-1).astype(jnp.int32),
        begin,
        (begin + -(-count // slots)).astype(jnp.int32),
    )
