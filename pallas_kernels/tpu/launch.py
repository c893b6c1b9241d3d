"""Launches a kernel with a grid over rows of queries, which walks the runs of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pages import Pages
from pallas_kernels.tpu import chips
from pallas_kernels.tpu.runs import TpuPlan
from pallas_kernels.tpu.walk import (
    BlockOperand,
    BlockRun,
    Buffers,
    RowWalk,
    RunsOfRow,
    Step,
    TileOperand,
    block_index,
    buffers,
    is_operand,
    run_of_words,
    window,
)


@dataclass(frozen=True)
class Launch:
    """The operands of a launch, whose grid is ``(heads, rows)``.

    A grid step reads the block of its row of each operand in ``rows``, and all blocks
    along the row of each in ``streams``. Each tile reads a window of each in ``tiles``.
    ``scratch`` are f32 shapes.
    """

    name: str
    heads: int
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


class _Scalars(NamedTuple):
    test_of_head: Any
    first_row: Any
    row_ptr: Any
    runs: Any

    def at(self, head: Any) -> Any:
        """The index of ``head`` in the arrays of heads."""
        return lax.rem(head, jnp.int32(self.test_of_head.shape[0]))


def launch(
    kernel: Callable[[Step, tuple, tuple, tuple], None], of: Launch, plan: TpuPlan
) -> tuple[jax.Array, ...]:
    """Runs ``kernel(step, row_refs, out_refs, scratch_refs)`` on every row of ``plan``.

    Returns the arrays of ``of.outs``.
    """
    scalars = _Scalars(plan.test_of_head, plan.first_row, plan.row_ptr, plan.runs)

    def row_spec(x: BlockOperand) -> pl.BlockSpec:
        def index(h: Any, i: Any, _: Any) -> tuple:
            at = x.head_of(h, 0)
            return block_index(at, i, 0) if x.axis == 1 else block_index(at, 0, i)

        return pl.BlockSpec((None, *x.block_shape(of.row_block)), index)

    def table_index(h: Any, i: Any, scalars: _Scalars) -> tuple:
        return block_index(scalars.first_row[scalars.at(h)] + i, 0, 0)

    tables, table_specs = (), ()
    if plan.table is not None:
        shape = (None, *plan.table.shape[1:])
        spec = pl.BlockSpec(shape, table_index, memory_space=pltpu.SMEM)
        tables, table_specs = (plan.table,), (spec,)
    pages, page_specs = (), ()
    if of.pages is not None:
        table = of.pages.table[:, None]
        pages, page_specs = (table,), (_page_spec(table, of),)
    moving = jax.tree.leaves((of.streams, of.tiles), is_leaf=is_operand)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(of.heads, plan.sizes.num_rows),
        in_specs=[
            table_specs,
            page_specs,
            jax.tree.map(row_spec, of.rows, is_leaf=is_operand),
            tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in moving),
        ],
        out_specs=[tuple(row_spec(x) for x in of.outs)],
        scratch_shapes=[
            tuple(pltpu.VMEM(shape, jnp.float32) for shape in of.scratch),
            buffers(moving, of.stream_block),
        ],
    )
    (out,) = pl.pallas_call(
        _body(kernel, of),
        out_shape=[tuple(x.array for x in of.outs)],
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=chips.vmem_limit_bytes(),
        ),
        interpret=of.interpret,
        name=of.name,
    )(
        scalars,
        tables,
        pages,
        jax.tree.map(lambda x: x.array, of.rows, is_leaf=is_operand),
        tuple(x.array for x in moving),
    )
    return out


def _page_spec(table: jax.Array, of: Launch) -> pl.BlockSpec:
    """The pages of one batch entry ``[1, pages of a sequence]``, in scalar memory."""
    heads_of_entry = of.heads // table.shape[0]

    def index(h: Any, i: Any, scalars: _Scalars) -> tuple:
        del i, scalars
        return block_index(lax.div(h, jnp.int32(heads_of_entry)), 0, 0)

    shape = (None, 1, table.shape[2])
    return pl.BlockSpec(shape, index, memory_space=pltpu.SMEM)


def _body(kernel: Callable, of: Launch) -> Callable[..., None]:
    operands, tree = jax.tree.flatten((of.streams, of.tiles), is_leaf=is_operand)

    def body(
        scalars: _Scalars, tables: tuple, pages: tuple, rows: tuple, moving: tuple,
        outs: tuple, scratch: tuple, held: Buffers,
    ) -> None:  # fmt: skip
        head, row = (pl.program_id(axis) for axis in range(2))
        at = scalars.at(head)
        heads = [x.head_of(head, 0) for x in operands]

        def place(x: BlockOperand | TileOperand, at: Any, block: Any) -> tuple:
            if isinstance(x, BlockOperand) and x.page_heads:
                return _in_page(x, at, of, pages[0], block)
            return at, *window(x, of.stream_block, row, block)

        def sources(block: Any) -> list:
            return [
                ref.at[*place(x, at, block)]
                for ref, x, at in zip(moving, operands, heads, strict=True)
            ]

        walk = RowWalk(_row_runs(scalars, tables, at, row), sources, held, tree)
        step = Step(row, scalars.test_of_head[at], walk.visit_blocks)
        kernel(step, rows, outs, scratch)

    return body


def _in_page(x: BlockOperand, head: Any, of: Launch, table: Any, block: Any) -> tuple:
    """The index of a block of a head whose keys lie in pages."""
    assert of.pages is not None
    size, heads = of.stream_block, jnp.int32(x.page_heads)
    column, first = of.pages.place(block, size)
    page = table[0, column]
    here = pl.ds(pl.multiple_of(first, size), size)
    return page * heads + lax.rem(head, heads), here, slice(None)


def _row_runs(scalars: _Scalars, tables: tuple, at: Any, row: Any) -> RunsOfRow:
    if tables:
        words = tables[0]

        def in_table(j: Any) -> BlockRun:
            return run_of_words(lambda i: words[0, i + 1], j)

        return RunsOfRow(jnp.int32(0), words[0, 0], in_table)

    def in_list(j: Any) -> BlockRun:
        return run_of_words(lambda i: scalars.runs[i], j)

    here = scalars.first_row[at] + row
    return RunsOfRow(scalars.row_ptr[here], scalars.row_ptr[here + 1], in_list)
