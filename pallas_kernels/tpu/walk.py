"""Visits the blocks along a row, each copied to VMEM one block ahead.

The arrays of the blocks stay in HBM. DMA copies each block into one of two slots in
VMEM while the kernel works on the block before (double buffering). The windows that
differ from tile to tile arrive the same way.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HeadOf = Callable[[Any, Any], Any]


def block_index(*index: Any) -> tuple:
    """The index of a block as int32, which the chip needs also with 64-bit mode on."""
    return tuple(jnp.asarray(i, jnp.int32) for i in index)


class BlockOperand(NamedTuple):
    """An array ``[heads, seq, dim]`` (``axis=1``) or ``[heads, n, seq]`` (``axis=2``).

    A kernel sees a block of it, ``[block, dim]`` or ``[n, block]``. ``head_of(head,
    member)`` is the head that a grid step reads. With ``page_heads``, the array is
    ``[pages * page_heads, page size, dim]``, and ``Launch.pages`` has the page of each
    block of a head.
    """

    array: Any
    head_of: HeadOf
    axis: int = 1
    page_heads: int | None = None

    def block_shape(self, block: int) -> tuple[int, int]:
        """The shape of one block of the sequence."""
        _, a, b = self.array.shape
        return (block, b) if self.axis == 1 else (a, block)


class TileOperand(NamedTuple):
    """An array ``[heads, planes, n, length]`` of which a tile reads ``[n, width]``.

    ``window_of(row, block)`` is the plane of the tile and the start of its window along
    ``length``, a multiple of ``step``.
    """

    array: Any
    head_of: HeadOf
    window_of: Callable[[Any, Any], tuple[Any, Any]]
    width: int
    step: int

    def block_shape(self, _: int) -> tuple[int, int]:
        """The shape of a window."""
        return self.array.shape[2], self.width


def is_operand(x: Any) -> bool:
    """Whether ``x`` is a leaf of a tree of operands."""
    return isinstance(x, BlockOperand | TileOperand)


def window(x: BlockOperand | TileOperand, size: int, row: Any, block: Any) -> tuple:
    """The index of what a tile reads, within one head of an operand."""
    if isinstance(x, BlockOperand):
        here = pl.ds(pl.multiple_of(block * size, size), size)
        return (here, slice(None)) if x.axis == 1 else (slice(None), here)
    plane, start = x.window_of(row, block)
    there = pl.ds(pl.multiple_of(start, x.step), x.width)
    return jnp.asarray(plane, jnp.int32), slice(None), there


class Buffers(NamedTuple):
    """Two slots for each moving operand, and a semaphore for each copy."""

    slots: tuple
    semaphores: Any


def buffers(moving: Sequence[Any], block: int) -> Buffers:
    """The scratch shapes of the ``Buffers`` of some operands."""
    slots = tuple(pltpu.VMEM((2, *x.block_shape(block)), x.array.dtype) for x in moving)
    return Buffers(slots, pltpu.SemaphoreType.DMA((2, max(1, len(moving)))))


class BlockRun(NamedTuple):
    """Blocks ``start : stop``, all full or all partial; int32 scalars."""

    start: Any
    stop: Any
    full: Any


class RunsOfRow(NamedTuple):
    """The runs ``begin : end`` of a row. ``at(j)`` is run ``j``."""

    begin: Any
    end: Any
    at: Callable[[Any], BlockRun]


def run_of_words(word: Callable[[Any], Any], j: Any) -> BlockRun:
    """Run ``j`` of a list, whose runs have the words ``(2 * start + full, stop)``."""
    first = word(2 * j)
    start = lax.shift_right_logical(first, jnp.int32(1))
    return BlockRun(start, word(2 * j + 1), first & 1)


class Step(NamedTuple):
    """The grid step of a kernel; ``row`` and ``test`` are int32 scalars."""

    row: Any  # index of the block of the row
    test: Any  # number of the predicate's test
    visit_blocks: Callable[..., None]  # RowWalk.visit_blocks


class RowWalk(NamedTuple):
    """The blocks that a grid step visits.

    ``sources(block)`` are the parts of the moving arrays that belong to a block.
    ``tree`` is the structure of the operands, ``(streams, tiles)``.
    """

    runs: RunsOfRow
    sources: Callable[[Any], list]
    buffers: Buffers
    tree: Any

    def visit_blocks(
        self, visit: Callable[[Any, Any, Any, bool], None], test_all: bool = False
    ) -> None:
        """Calls ``visit(block, refs, tiles, full)`` for each block of the row.

        ``refs`` and ``tiles`` have the structure of the operands. ``full`` is a Python
        bool: full and partial blocks have separate code. With ``test_all``, all blocks
        are visited as partial.
        """

        def at_slot(block: Any, slot: Any, full: bool) -> None:
            held = [x.at[slot] for x in self.buffers.slots]
            refs, tiles = jax.tree.unflatten(self.tree, held)
            visit(block, refs, tiles, full)

        _visit_runs(self.runs, self._copies, at_slot, test_all)

    def _copies(self, block: Any, slot: Any) -> list:
        return [
            pltpu.make_async_copy(
                source,
                self.buffers.slots[i].at[slot],
                self.buffers.semaphores.at[slot, jnp.int32(i)],
            )
            for i, source in enumerate(self.sources(block))
        ]


def _visit_runs(
    runs: RunsOfRow,
    copies: Callable[[Any, Any], list],
    visit: Callable[[Any, Any, bool], None],
    test_all: bool,
) -> None:
    """Visits the blocks of the runs, each fetched one block ahead."""
    begin, end, run_at = runs

    def fetch(block: Any, slot: Any) -> None:
        for copy in copies(block, slot):
            copy.start()

    # A row without runs has no first block: run_at(begin) belongs to another row.
    @pl.when(begin < end)
    def _() -> None:
        fetch(run_at(begin).start, jnp.int32(0))

    def visit_run(j: Any, slot: Any) -> Any:
        start, stop, full = run_at(j)
        last = j + 1 == end
        after = run_at(jnp.minimum(j + 1, end - 1)).start

        def visitor(full: bool) -> Callable[[Any, Any], Any]:
            def step(block: Any, slot: Any) -> Any:
                inside = block + 1 < stop

                @pl.when(inside | jnp.logical_not(last))
                def _() -> None:
                    fetch(jnp.where(inside, block + 1, after), 1 - slot)

                for copy in copies(block, slot):
                    copy.wait()
                visit(block, slot, full)
                return 1 - slot

            return step

        if test_all:
            return lax.fori_loop(start, stop, visitor(False), slot)
        middle = jnp.where(full == 1, stop, start)
        slot = lax.fori_loop(start, middle, visitor(True), slot)
        return lax.fori_loop(middle, stop, visitor(False), slot)

    lax.fori_loop(begin, end, visit_run, jnp.int32(0))
