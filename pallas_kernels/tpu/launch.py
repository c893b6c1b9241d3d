"""Launches a kernel: a grid over rows, and a loop over the runs of each row.

The blocks along a row stay in HBM. DMA copies each into one of two slots in VMEM, one
block ahead of the block that the kernel works on (double buffering). The windows that
differ from tile to tile arrive the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pages import Pages
from pallas_kernels.tpu.runs import TpuPlan

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


@dataclass(frozen=True)
class Launch:
    """The operands of a launch, whose grid is ``(heads, rows, members)``.

    A grid step reads the block of its row of each operand in ``rows``, and all blocks
    along the row of each in ``streams``. Each tile reads a window of each in ``tiles``.
    ``members`` is the number of query heads that share a row: the group in the dkv
    kernel, otherwise 1. ``scratch`` are f32 shapes.
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
    # The pages of each batch entry; heads are those of all entries, one by one.
    pages: Pages | None = None


def _is_operand(x: Any) -> bool:
    return isinstance(x, BlockOperand | TileOperand)


class Step(NamedTuple):
    """The grid step of a kernel; ``row``, ``member`` and ``test`` are int32 scalars."""

    row: Any  # index of the block of the row
    member: Any  # index of the query head in its group
    test: Any  # number of the predicate's test
    # visit_blocks(visit, test_all) calls visit(block, refs, tiles, full) for each block
    # of the row. refs and tiles have the structure of Launch.streams and Launch.tiles.
    # full is a Python bool: full and partial blocks have separate code. With test_all,
    # all blocks are visited as partial.
    visit_blocks: Callable[..., None]


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
        """The index of ``query_head`` in the arrays of heads."""
        return lax.rem(query_head, jnp.int32(self.test_of_head.shape[0]))


def launch(
    kernel: Callable[[Step, tuple, tuple, tuple], None], of: Launch, plan: TpuPlan
) -> tuple[jax.Array, ...]:
    """Runs ``kernel(step, row_refs, out_refs, scratch_refs)`` on every row of ``plan``.

    Returns the arrays of ``of.outs``.
    """
    scalars = _Scalars(plan.test_of_head, plan.first_row, plan.row_ptr, plan.runs)

    def row_spec(x: BlockOperand) -> pl.BlockSpec:
        def index(h: Any, i: Any, g: Any, _: Any) -> tuple:
            at = x.head_of(h, g)
            return block_index(at, i, 0) if x.axis == 1 else block_index(at, 0, i)

        return pl.BlockSpec((None, *x.block_shape(of.row_block)), index)

    def table_index(h: Any, i: Any, g: Any, scalars: _Scalars) -> tuple:
        return block_index(scalars.first_row[scalars.at(h * of.members + g)] + i, 0, 0)

    tables, table_specs = (), ()
    if plan.table is not None:
        shape = (None, *plan.table.shape[1:])
        spec = pl.BlockSpec(shape, table_index, memory_space=pltpu.SMEM)
        tables, table_specs = (plan.table,), (spec,)
    pages, page_specs = (), ()
    if of.pages is not None:
        table = of.pages.table[:, None]
        pages, page_specs = (table,), (_page_spec(table, of),)
    moving = jax.tree.leaves((of.streams, of.tiles), is_leaf=_is_operand)
    buffers = tuple(
        pltpu.VMEM((2, *x.block_shape(of.stream_block)), x.array.dtype) for x in moving
    )
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(of.heads, plan.sizes.num_rows, of.members),
        in_specs=[
            table_specs,
            page_specs,
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
        pages,
        jax.tree.map(lambda x: x.array, of.rows, is_leaf=_is_operand),
        tuple(x.array for x in moving),
    )
    return out


def _page_spec(table: jax.Array, of: Launch) -> pl.BlockSpec:
    """The pages of one batch entry ``[1, pages of a sequence]``, in scalar memory."""
    heads_of_entry = of.heads // table.shape[0]

    def index(h: Any, i: Any, g: Any, scalars: _Scalars) -> tuple:
        del i, g, scalars
        return block_index(lax.div(h, jnp.int32(heads_of_entry)), 0, 0)

    shape = (None, 1, table.shape[2])
    return pl.BlockSpec(shape, index, memory_space=pltpu.SMEM)


def _body(kernel: Callable, of: Launch) -> Callable[..., None]:
    operands, tree = jax.tree.flatten((of.streams, of.tiles), is_leaf=_is_operand)
    size = of.stream_block

    def body(
        scalars: _Scalars, tables: tuple, pages: tuple, rows: tuple, moving: tuple,
        outs: tuple, scratch: tuple, buffers: tuple, semaphores: Any,
    ) -> None:  # fmt: skip
        head, row, member = (pl.program_id(axis) for axis in range(3))
        query_head = head * of.members + member
        at = scalars.at(query_head)
        begin, end, run_at = _row_runs(scalars, tables, at, row)
        heads = [x.head_of(head, member) for x in operands]

        def place(x: BlockOperand | TileOperand, at: Any, block: Any) -> tuple:
            if isinstance(x, BlockOperand) and x.page_heads:
                return _in_page(x, at, of, pages[0], block)
            return at, *_window(x, size, row, block)

        def copies(block: Any, slot: Any) -> list:
            sources = [
                ref.at[*place(x, at, block)]
                for ref, x, at in zip(moving, operands, heads, strict=True)
            ]
            return [
                pltpu.make_async_copy(
                    x, buffers[i].at[slot], semaphores.at[slot, jnp.int32(i)]
                )
                for i, x in enumerate(sources)
            ]

        def visit_blocks(
            visit: Callable[[Any, tuple, tuple, bool], None], test_all: bool = False
        ) -> None:
            def at_slot(block: Any, slot: Any, full: bool) -> None:
                refs, tiles = jax.tree.unflatten(tree, [x.at[slot] for x in buffers])
                visit(block, refs, tiles, full)

            _visit_runs(begin, end, run_at, copies, at_slot, test_all)

        step = Step(row, member, scalars.test_of_head[at], visit_blocks)
        kernel(step, rows, outs, scratch)

    return body


def _window(x: BlockOperand | TileOperand, size: int, row: Any, block: Any) -> tuple:
    """The index of what a tile reads, within one head of an operand."""
    if isinstance(x, BlockOperand):
        here = pl.ds(pl.multiple_of(block * size, size), size)
        return (here, slice(None)) if x.axis == 1 else (slice(None), here)
    plane, start = x.window_of(row, block)
    there = pl.ds(pl.multiple_of(start, x.step), x.width)
    return jnp.asarray(plane, jnp.int32), slice(None), there


def _in_page(x: BlockOperand, head: Any, of: Launch, table: Any, block: Any) -> tuple:
    """The index of a block of a head whose keys lie in pages."""
    assert of.pages is not None
    size, heads = of.stream_block, jnp.int32(x.page_heads)
    column, first = of.pages.place(block, size)
    page = table[0, column]
    here = pl.ds(pl.multiple_of(first, size), size)
    return page * heads + lax.rem(head, heads), here, slice(None)


def _row_runs(
    scalars: _Scalars, tables: tuple, at: Any, row: Any
) -> tuple[Any, Any, Callable[[Any], _Run]]:
    """The range ``begin, end`` of the runs of a row, and ``run_at(j)``."""
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


def _visit_runs(
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
