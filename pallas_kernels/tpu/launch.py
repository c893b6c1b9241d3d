"""One launch: a grid over rows, and a walk over the runs of each.

The blocks along a row stay in HBM and come by DMA into one of two slots, the next block
while the present one is worked on. So do the windows of what differs from tile to tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.runs import RowList

HeadOf = Callable[[Any, Any], Any]


def block_index(*index: Any) -> tuple:
    """The index of a block, int32 also with ``jax_enable_x64``: a chip has no other."""
    return tuple(jnp.asarray(i, jnp.int32) for i in index)


class BlockOperand(NamedTuple):
    """An array ``[heads, seq, dim]`` (``axis=1``) or ``[heads, n, seq]`` (``axis=2``).

    ``head_of(head, member)`` is the head that a grid step reads.
    """

    array: Any
    head_of: HeadOf
    axis: int = 1

    def block_shape(self, block: int) -> tuple[int, int]:
        """The shape of one block of the sequence."""
        _, a, b = self.array.shape
        return (block, b) if self.axis == 1 else (a, block)


class TileOperand(NamedTuple):
    """An array ``[heads, planes, n, length]`` of which a tile reads ``[n, width]``.

    ``window_of(row, block)`` is its plane and start, a multiple of ``step``.
    """

    array: Any
    head_of: HeadOf
    window_of: Callable[[Any, Any], tuple[Any, Any]]
    width: int
    step: int

    def block_shape(self, _: int) -> tuple[int, int]:
        """The shape of a window."""
        return self.array.shape[2], self.width


@dataclass(frozen=True)
class Launch:
    """The arrays of a launch; ``rows`` have the block of the row, ``streams`` others.

    A tile reads its own part of ``tiles``. The grid is ``(heads, rows, members)``:
    ``members`` query heads share a row.
    """

    name: str
    heads: int
    members: int
    row_block: int
    stream_block: int
    rows: tuple  # a tree of BlockOperand
    streams: tuple  # a tree of BlockOperand
    tiles: tuple  # a tree of TileOperand
    outs: tuple[BlockOperand, ...]
    scratch: tuple[tuple[int, int], ...]
    interpret: Any


def _is_operand(x: Any) -> bool:
    return isinstance(x, BlockOperand | TileOperand)


class Step(NamedTuple):
    """What a kernel knows of its grid step."""

    row: Any  # the block that the row is
    member: Any
    test: Any
    # walk(visit, test_all) calls visit(block, refs, tiles, full) on every block of the
    # row, where ``refs`` are of the streams, ``tiles`` of the tile operands, and
    # ``full`` is a Python bool: the two kinds of run have code of their own, unless all
    # blocks are to be tested as if they were partial.
    walk: Callable[..., None]


class _Run(NamedTuple):
    start: Any
    stop: Any
    full: Any


class _Scalars(NamedTuple):
    test_of_head: Any
    first_row: Any
    row_ptr: Any
    runs: Any

    def at(self, query_head: Any) -> Any:
        """Where the lists of heads hold ``query_head``."""
        return lax.rem(query_head, jnp.int32(self.test_of_head.shape[0]))


def launch(
    kernel: Callable[[Step, tuple, tuple, tuple], None], of: Launch, lists: RowList
) -> tuple[jax.Array, ...]:
    """The outputs of ``kernel(step, row_refs, out_refs, scratch_refs)`` on all rows."""
    scalars = _Scalars(lists.test_of_head, lists.first_row, lists.row_ptr, lists.runs)

    def row_spec(x: BlockOperand) -> pl.BlockSpec:
        def index(h: Any, i: Any, g: Any, _: Any) -> tuple:
            at = x.head_of(h, g)
            return block_index(at, i, 0) if x.axis == 1 else block_index(at, 0, i)

        return pl.BlockSpec((None, *x.block_shape(of.row_block)), index)

    def table_index(h: Any, i: Any, g: Any, lists: _Scalars) -> tuple:
        return block_index(lists.first_row[lists.at(h * of.members + g)] + i, 0, 0)

    tables, table_specs = (), ()
    if lists.table is not None:
        shape = (None, *lists.table.shape[1:])
        spec = pl.BlockSpec(shape, table_index, memory_space=pltpu.SMEM)
        tables, table_specs = (lists.table,), (spec,)
    moving = jax.tree.leaves((of.streams, of.tiles), is_leaf=_is_operand)
    buffers = tuple(
        pltpu.VMEM((2, *x.block_shape(of.stream_block)), x.array.dtype) for x in moving
    )
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(of.heads, lists.sizes.num_rows, of.members),
        in_specs=[
            table_specs,
            jax.tree.map(row_spec, of.rows, is_leaf=_is_operand),
            tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in moving),
        ],
        out_specs=[tuple(row_spec(x) for x in of.outs)],
        scratch_shapes=[
            tuple(pltpu.VMEM(shape, jnp.float32) for shape in of.scratch),
            buffers,
            pltpu.SemaphoreType.DMA((2, max(1, len(moving)))),
        ],
    )
    (out,) = pl.pallas_call(
        _body(kernel, of),
        out_shape=[tuple(x.array for x in of.outs)],
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=of.interpret,
        name=of.name,
    )(
        scalars,
        tables,
        jax.tree.map(lambda x: x.array, of.rows, is_leaf=_is_operand),
        tuple(x.array for x in moving),
    )
    return out


def _body(kernel: Callable, of: Launch) -> Callable[..., None]:
    operands, tree = jax.tree.flatten((of.streams, of.tiles), is_leaf=_is_operand)
    size = of.stream_block

    def body(
        scalars: _Scalars, tables: tuple, rows: tuple, moving: tuple, outs: tuple,
        scratch: tuple, buffers: tuple, semaphores: Any,
    ) -> None:  # fmt: skip
        head, row, member = (pl.program_id(axis) for axis in range(3))
        query_head = head * of.members + member
        at = scalars.at(query_head)
        begin, end, run_at = _row_runs(scalars, tables, at, row)
        heads = [x.head_of(head, member) for x in operands]

        def copies(block: Any, slot: Any) -> list:
            sources = [
                ref.at[at, *window]
                for ref, at, window in zip(
                    moving, heads, _windows(operands, size, row, block), strict=True
                )
            ]
            return [
                pltpu.make_async_copy(
                    x, buffers[i].at[slot], semaphores.at[slot, jnp.int32(i)]
                )
                for i, x in enumerate(sources)
            ]

        def walk(
            visit: Callable[[Any, tuple, tuple, bool], None], test_all: bool = False
        ) -> None:
            def at_slot(block: Any, slot: Any, full: bool) -> None:
                refs, tiles = jax.tree.unflatten(tree, [x.at[slot] for x in buffers])
                visit(block, refs, tiles, full)

            _walk(begin, end, run_at, copies, at_slot, test_all)

        step = Step(row, member, scalars.test_of_head[at], walk)
        kernel(step, rows, outs, scratch)

    return body


def _windows(
    operands: list[BlockOperand | TileOperand], size: int, row: Any, block: Any
) -> list[tuple]:
    """The index of what a tile reads, within one head of each operand."""
    here = pl.ds(pl.multiple_of(block * size, size), size)

    def window(x: BlockOperand | TileOperand) -> tuple:
        if isinstance(x, BlockOperand):
            return (here, slice(None)) if x.axis == 1 else (slice(None), here)
        plane, start = x.window_of(row, block)
        there = pl.ds(pl.multiple_of(start, x.step), x.width)
        return jnp.asarray(plane, jnp.int32), slice(None), there

    return [window(x) for x in operands]


def _row_runs(
    scalars: _Scalars, tables: tuple, at: Any, row: Any
) -> tuple[Any, Any, Callable[[Any], _Run]]:
    """The range of the runs of a row, and a reader of one."""
    if tables:
        words, begin, end, offset = tables[0], jnp.int32(0), tables[0][0, 0], 1

        def word(i: Any) -> Any:
            return words[0, i + offset]
    else:
        here = scalars.first_row[at] + row
        begin, end = scalars.row_ptr[here], scalars.row_ptr[here + 1]

        def word(i: Any) -> Any:
            return scalars.runs[i]

    def run_at(j: Any) -> _Run:
        first = word(2 * j)
        start = lax.shift_right_logical(first, jnp.int32(1))
        return _Run(start, word(2 * j + 1), first & 1)

    return begin, end, run_at


def _walk(
    begin: Any,
    end: Any,
    run_at: Callable[[Any], _Run],
    copies: Callable[[Any, Any], list],
    visit: Callable[[Any, Any, bool], None],
    test_all: bool,
) -> None:
    """Visits the blocks of the runs ``begin : end``, each fetched one block ahead."""

    def fetch(block: Any, slot: Any) -> None:
        for copy in copies(block, slot):
            copy.start()

    # A row without a run has no first block to fetch, and its entry is another row's.
    @pl.when(begin < end)
    def _() -> None:
        fetch(run_at(begin).start, jnp.int32(0))

    def walk_run(j: Any, slot: Any) -> Any:
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

    lax.fori_loop(begin, end, walk_run, jnp.int32(0))
