"""Prepares the kernel call of one softmax: the order, arrays, plans and block sizes."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from lowering import pipeline, planning
from lowering.expr.kernel_test import KernelPredicate
from lowering.pipeline import Program, Stages
from lowering.planning import BlockSizes
from lowering.run_time import bias_values, pair_bits, plans, sort
from lowering.run_time.vectors import vectors_of
from pallas_kernels import dispatch
from pallas_kernels.call import Call, Inputs, Masks, Vectors
from pallas_kernels.config import Tile, TileCounts, Tiles
from sadsl.run.options import Options

# The most positions on which block sizes are compared.
COUNTED = 65536


class Prepared(NamedTuple):
    """All that a kernel call needs beside q, k and v.

    Attributes:
      stages: the lowered map, in the order of positions that the kernels work in.
      vectors: the run-time arrays that the predicate reads, in that order.
      masks: the plans of the forward, dq and dkv kernels.
      orders: the order of positions, where it is a sort made at run time.
    """

    stages: Stages
    vectors: Vectors
    masks: Masks
    orders: sort.Orders | None

    def to_slots(self, q: Array, k: Array, v: Array) -> Inputs:
        """``[batch, seq, heads, dim]`` in the order of the kernels, heads in front."""
        layouts = self.stages.layouts
        if layouts is not None:
            # Before the heads come to the front: then both moves are one change of
            # layout.
            q = layouts.q.to_slots(q, 1)
            k, v = (layouts.kv.to_slots(x, 1) for x in (k, v))
        if self.orders is not None:
            q, k, v = self.orders.to_slots(q, k, v)
        return Inputs(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))

    def to_positions(self, o: Array, numbers: Array) -> tuple[Array, Array]:
        """``o [batch, heads, q, dim]`` and ``[batch, heads, q]`` by position.

        The heads of ``o`` go back behind the positions.
        """
        layouts, o = self.stages.layouts, jnp.swapaxes(o, 1, 2)
        if layouts is not None:
            o = layouts.q.to_positions(o, 1)
            numbers = layouts.q.to_positions(numbers, 2)
        if self.orders is not None:
            o, numbers = self.orders.to_positions(o, numbers)
        return o, numbers


def prepare(
    arrays: Mapping[str, Array],
    options: Options,
    tiles: Tiles,
    dtype: Any = jnp.float32,
) -> Prepared:
    """Prepares a call; whatever depends on run-time arrays is computed from them.

    Args:
      arrays: the run-time arrays of the call, ``[batch or 1, ...]``, by name.
      options: the static part of the call.
      tiles: the block sizes of the three kernels.
      dtype: the dtype in which the kernels compute.
    """
    stages, orders = options.arranged(tiles), None
    if options.sorted_by is not None:
        orders = sort.orders(options.sorted_by, options.stages["simplify"], arrays)
        arrays = {**arrays, **orders.operands}
    vectors = call_vectors(stages, arrays, tiles)
    lowered = options.lowered_score
    if lowered is not None:
        added = bias_values.values(lowered, options.problem, arrays, dtype)
        vectors = vectors._replace(scores=added)
    if plans.is_run_time(stages):
        masks = plans.masks(stages, tiles, vectors)
    else:
        masks = pipeline.masks(stages, tiles)
    return Prepared(stages, vectors, masks, orders)


def call_vectors(stages: Stages, arrays: Mapping[str, Array], tiles: Tiles) -> Vectors:
    """The vectors and bits that the predicate reads, computed from the operands."""
    program = stages["hoist"]
    lengths = program.problem.q_seq_len, program.problem.kv_seq_len
    num_heads, block_kv = program.problem.num_heads, tiles.forward.block_kv
    blocks_q = tiles.forward.block_q, tiles.dq.block_q, tiles.dkv.block_q
    return Vectors(
        vectors_of(program.q_vectors, lengths[0], num_heads, arrays),
        vectors_of(program.kv_vectors, lengths[1], num_heads, arrays),
        pair_bits.pack(program.bits, lengths, block_kv, num_heads, arrays, blocks_q),
    )


def kernel_call(
    options: Options, stages: Stages, tiles: Tiles, dtype: Any = jnp.float32
) -> Call:
    """The static part of the kernel call."""
    score = options.lowered_score
    return Call(
        predicate=KernelPredicate(stages["hoist"].maps),
        sm_scale=options.setting.sm_scale,
        tiles=tiles,
        logits_soft_cap=options.term.logits_soft_cap,
        interpret=options.setting.interpret,
        scores=None if score is None else replace(score.kernel, dtype=dtype),
        learned_scores=score is not None and score.learned,
        dropout_rate=options.setting.dropout_rate,
        residual_name=options.setting.config.residual_name,
    )


@lru_cache(maxsize=512)
def tile_counts(program: Program, block_q: int, block_kv: int) -> TileCounts:
    """The blocks of a size that the heads visit, in the given order of positions.

    Of a long call, the first positions are counted.
    """
    problem = program.problem
    lengths = problem.q_seq_len, problem.kv_seq_len
    if lengths[0] == lengths[1]:
        lengths = (min(COUNTED, lengths[0]),) * 2
    sizes = BlockSizes(*lengths, block_q, block_kv)
    mask = planning.plan(program.maps, program.map_of_head, sizes)
    visited, partial_ = (
        int(of_map[mask.map_of_head].sum())
        for of_map in (mask.visited_by_map(), mask.partial_by_map())
    )
    num_heads = len(mask.map_of_head)
    return TileCounts(
        full=visited - partial_,
        partial=partial_,
        q_rows=num_heads * mask.num_q_blocks,
        kv_rows=num_heads * mask.num_kv_blocks,
    )


def choose_tiles(options: Options, head_dim: int, head_dim_v: int, dtype: Any) -> Tiles:
    """The block sizes of a call: those of the config, else defaults of the backend.

    Raises:
      ValueError: the call looks up pairs in a run-time array, and the config names
        different values of ``block_kv`` for the three kernels.
    """
    backend, problem = dispatch.BACKENDS[options.setting.impl], options.problem
    lengths = problem.q_seq_len, problem.kv_seq_len
    defaults = backend.default_tiles(lengths, head_dim, head_dim_v, dtype)
    config = options.setting.config
    named = config.block_q is not None and config.block_kv is not None
    if not (named or options.stages["hoist"].bits or options.score is not None):

        def counts(block_q: int, block_kv: int) -> TileCounts:
            # The order of positions depends on the blocks.
            tile = Tile(block_q=block_q, block_kv=block_kv)
            program = options.arranged(Tiles(tile, tile, tile)).planned
            return tile_counts(program, block_q, block_kv)

        defaults = backend.default_tiles(lengths, head_dim, head_dim_v, dtype, counts)
    if not options.stages["hoist"].bits:
        return options.setting.config.resolve(defaults)
    # Bits of pairs are packed once, for one block_kv. The smallest default is used,
    # since it fits the registers of all three kernels.
    smallest = min(t.block_kv for t in (defaults.forward, defaults.dq, defaults.dkv))
    tiles = options.setting.config.resolve(defaults.with_block_kv(smallest))
    sizes = tiles.forward.block_kv, tiles.dq.block_kv, tiles.dkv.block_kv
    if len(set(sizes)) > 1:
        raise ValueError(
            f"config: block_kv is {sizes[0]} in the forward kernel, {sizes[1]} in dq "
            f"and {sizes[2]} in dkv, but {options.term!r} looks up pairs in a run-time "
            "array, which is packed for one block_kv: name the same in all three"
        )
    return tiles
