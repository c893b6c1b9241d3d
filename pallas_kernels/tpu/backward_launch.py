"""Launches the backward kernel: a grid over pairs of a segment and a key block.

The dq of a segment stays in VMEM until the last row of the segment. The dk and dv of a
key block are sums over the rows with this key block: one in each segment that sees it.
With one segment they are written once. With more they are f32 sums in HBM, to which
each row adds. Grid steps run in order, so sums repeat bit by bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import backward_results, chips, segments
from pallas_kernels.tpu.backward_results import Dq, DqScratch, KeyScratch, OfKeys
from pallas_kernels.tpu.segments import BackwardPlan
from pallas_kernels.tpu.walk import (
    BlockOperand,
    BlockRun,
    Buffers,
    RowWalk,
    RunsOfRow,
    Step,
    block_index,
    buffers,
    is_operand,
    run_of_words,
    window,
)


@dataclass(frozen=True)
class BackwardLaunch:
    """The operands of the launch, whose grid is ``(key heads, rows, members)``.

    A grid step reads the block of its key block of each operand in ``rows``, and all
    blocks of queries along the row of each in ``streams``. Each tile reads a window of
    each in ``tiles``. ``dq`` is ``[query heads, head_dim, q]``, in whole segments.
    ``of_keys`` are ``[key heads, dim, kv]``: dk, and dv unless values are part of keys.
    All results are transposed. ``scales`` multiply the sums.
    """

    key_heads: int
    rows: tuple  # a tree of BlockOperand
    streams: tuple  # a tree of BlockOperand
    tiles: tuple  # a tree of TileOperand
    dq: jax.ShapeDtypeStruct
    of_keys: tuple[jax.ShapeDtypeStruct, ...]
    scales: tuple[float, ...]  # of dq and of each of ``of_keys``
    interpret: Any


class BackwardSums(NamedTuple):
    """The refs to which the backward kernel adds, and the keys of the row."""

    dq_of: Callable[[Any], Any]  # the ref of a query block, f32 [head_dim, block_q]
    of_keys: tuple  # refs f32 [dim, block_kv]
    keys: Any  # ref [head_dim, block_kv]: the transposed keys
    new_keys: Any  # bool: the kernel has to set them


class _BackwardScalars(NamedTuple):
    test_of_head: Any
    first_row: Any
    first_place: Any
    places: Any
    row_runs: Any
    runs: Any


class _Scratch(NamedTuple):
    """What stays in VMEM between grid steps."""

    dq: DqScratch
    of_keys: KeyScratch
    keys: Any  # [head_dim, block_kv]: the transposed keys of the row
    moving: Buffers


def launch(
    kernel: Callable[[Step, tuple, BackwardSums], None],
    of: BackwardLaunch,
    plan: BackwardPlan,
) -> tuple[jax.Array, ...]:
    """Runs ``kernel(step, row_refs, sums)`` on every row of ``plan``.

    Returns the arrays ``(of.dq, *of.of_keys)``.
    """
    sizes, parts = plan.sizes, plan.segments
    scalars = _BackwardScalars(
        plan.test_of_head, plan.first_row, plan.first_place, plan.places,
        plan.row_runs, plan.runs,
    )  # fmt: skip

    def at(scalars: _BackwardScalars, h: Any, i: Any, g: Any) -> tuple[Any, Any]:
        place = segments.place_of(plan, scalars, h, i)
        return place.column, place.chunk * jnp.int32(parts.members) + g

    def row_spec(x: BlockOperand) -> pl.BlockSpec:
        def index(h: Any, i: Any, g: Any, scalars: _BackwardScalars) -> tuple:
            column, member = at(scalars, h, i, g)
            own = x.head_of(h, member)
            if x.axis == 1:
                return block_index(own, column, 0)
            return block_index(own, 0, column)

        return pl.BlockSpec((None, *x.block_shape(sizes.block_kv)), index)

    def table_index(h: Any, i: Any, g: Any, scalars: _BackwardScalars) -> tuple:
        column, member = at(scalars, h, i, g)
        head = _period(scalars.test_of_head, h * parts.group + member)
        return block_index(scalars.first_row[head] + column, 0, 0)

    tables, table_specs = (), ()
    if plan.table is not None:
        shape = (None, *plan.table.shape[1:])
        spec = pl.BlockSpec(shape, table_index, memory_space=pltpu.SMEM)
        tables, table_specs = (plan.table,), (spec,)
    moving = jax.tree.leaves((of.streams, of.tiles), is_leaf=is_operand)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(of.key_heads, plan.num_rows, parts.members),
        in_specs=[
            table_specs,
            jax.tree.map(row_spec, of.rows, is_leaf=is_operand),
            tuple(anywhere for _ in moving),
        ],
        out_specs=[tuple(anywhere for _ in (of.dq, *of.of_keys))],
        scratch_shapes=[_scratch(of, plan, moving)],
    )
    (out,) = pl.pallas_call(
        _body(kernel, of, plan),
        out_shape=[(of.dq, *of.of_keys)],
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=chips.vmem_limit_bytes(),
        ),
        interpret=of.interpret,
        name="sadsl_backward",
    )(
        scalars,
        tables,
        jax.tree.map(lambda x: x.array, of.rows, is_leaf=is_operand),
        tuple(x.array for x in moving),
    )
    return out


def _period(x: Any, head: Any) -> Any:
    """The index of ``head`` in an array that repeats."""
    return lax.rem(head, jnp.int32(x.shape[0]))


def _scratch(of: BackwardLaunch, plan: BackwardPlan, moving: list) -> _Scratch:
    head_dim, block_kv = of.dq.shape[1], plan.sizes.block_kv
    return _Scratch(
        dq=backward_results.dq_scratch(of.dq, plan),
        of_keys=backward_results.key_scratch(of.of_keys, plan),
        keys=pltpu.VMEM((head_dim, block_kv), of.rows[0].array.dtype),
        moving=buffers(moving, plan.sizes.block_q),
    )


def _body(
    kernel: Callable, of: BackwardLaunch, plan: BackwardPlan
) -> Callable[..., None]:
    sizes, parts = plan.sizes, plan.segments
    operands, tree = jax.tree.flatten((of.streams, of.tiles), is_leaf=is_operand)

    def body(
        scalars: _BackwardScalars, tables: tuple, rows: tuple, moving: tuple,
        outs: tuple, scratch: _Scratch,
    ) -> None:  # fmt: skip
        head, row, part = (pl.program_id(axis) for axis in range(3))
        place = segments.place_of(plan, scalars, head, row)
        member = place.chunk * parts.members + part
        query_head = head * parts.group + member
        heads = [x.head_of(head, member) for x in operands]
        first, last = part == 0, part == parts.members - 1
        dq = Dq(scratch.dq, plan.segments, of.scales[0], place.segment, part)
        of_keys = OfKeys(
            scratch.of_keys,
            outs[1:],
            of.scales[1:],
            parts.count > 1,
            head,
            place.column,
        )

        @pl.when(first)
        def _() -> None:
            of_keys.open(row, place.adds)

        @pl.when(place.opens)
        def _() -> None:
            dq.open()

        def sources(block: Any) -> list:
            return [
                ref.at[at, *window(x, sizes.block_q, place.column, block)]
                for ref, x, at in zip(moving, operands, heads, strict=True)
            ]

        test = scalars.test_of_head[_period(scalars.test_of_head, query_head)]
        runs = _row_runs(plan, scalars, tables, query_head, row, dq.first_block)
        walk = RowWalk(runs, sources, scratch.moving, tree)
        step = Step(place.column, test, walk.visit_blocks)
        sums = BackwardSums(dq.of_block, scratch.of_keys.sums, scratch.keys, first)
        kernel(step, rows, sums)

        @pl.when(last & place.writes)
        def _() -> None:
            of_keys.close(place.adds)

        @pl.when(last & (row == plan.num_rows - 1))
        def _() -> None:
            of_keys.wait()

        @pl.when(place.closes)
        def _() -> None:
            dq.close(outs[0].at[query_head])

    return body


def _row_runs(
    plan: BackwardPlan, scalars: _BackwardScalars, tables: tuple, query_head: Any,
    row: Any, begin: Any,
) -> RunsOfRow:  # fmt: skip
    """The runs of a row. Those of a table are cut at the borders of the segment."""
    first = scalars.first_row[_period(scalars.first_row, query_head)]
    if not tables:

        def in_list(j: Any) -> BlockRun:
            return run_of_words(lambda i: scalars.runs[i], j)

        at = 2 * (first + row)
        return RunsOfRow(scalars.row_runs[at], scalars.row_runs[at + 1], in_list)
    words = tables[0]

    def in_table(j: Any) -> BlockRun:
        return run_of_words(lambda i: words[0, i + 1], j)

    count = words[0, 0]
    if plan.segments.of_head == 1:
        return RunsOfRow(jnp.int32(0), count, in_table)
    end = begin + plan.segments.blocks

    def cut(j: Any) -> BlockRun:
        start, stop, full = in_table(j)
        return BlockRun(jnp.maximum(start, begin), jnp.minimum(stop, end), full)

    def counted(j: Any, found: tuple) -> tuple:
        start, stop, _ = in_table(j)
        before, until = found
        ends, begins = stop <= begin, start < end
        return before + ends.astype(jnp.int32), until + begins.astype(jnp.int32)

    zero = jnp.int32(0)
    first_run, last_run = lax.fori_loop(zero, count, counted, (zero, zero))
    return RunsOfRow(first_run, last_run, cut)
