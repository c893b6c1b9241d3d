"""The loop that both passes share: rows of blocks, each folded in one go or chunked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.xla.lists import Chunks, Long, Short, Walk
from pallas_kernels.xla.tile import Pairs, padding_bias


class Pass(NamedTuple):
    """What a pass does with a row of query blocks."""

    # open(total, row) -> (what stays the same within the row, the state to fold into)
    open: Callable[[Any, Array], tuple[Any, Any]]
    # fold(fixed, state, block, bias) -> state, where bias is added to capped scores
    fold: Callable[[Any, Any, Array, Array], Any]
    # close(fixed, state, row) -> total
    close: Callable[[Any, Any, Array], Any]


def fold_rows(walk: Walk, pairs: Pairs, steps: Pass, total: Any) -> Any:
    """Takes ``total`` through all rows of ``walk`` that visit a block."""
    for short in walk.short:
        total = _fold_short(short, pairs, steps, total)
    return total if walk.long is None else _fold_long(walk.long, pairs, steps, total)


def _fold_short(short: Short, pairs: Pairs, steps: Pass, total: Any) -> Any:
    def step(total: Any, line: tuple[Array, ...]) -> tuple[Any, None]:
        row, block, *_ = line
        fixed, state = steps.open(total, row)
        bias = pairs.with_scores(row_bias(short, pairs, line), row, block)
        state = steps.fold(fixed, state, block, bias)
        return steps.close(fixed, state, row), None

    lines = (short.row, short.block, short.num_full, short.num_partial)
    return jax.lax.scan(step, total, lines)[0]


def row_bias(
    short: Short, pairs: Pairs, line: tuple[Array, ...]
) -> Float32[Array, "..."]:
    """The bias of one row: the predicate is asked about the partial blocks alone."""
    row, block, num_full, num_partial = line
    slots, full_slots = block.shape[0], short.full_slots
    full = padding_bias(num_full, full_slots, pairs.block_kv)
    if full_slots == slots:
        return full
    partial = pairs.bias(row, block[full_slots:], num_partial)
    # One bias over both kinds keeps a row at one matrix product and one softmax.
    full = jnp.broadcast_to(full, (*partial.shape[:-1], full.shape[-1]))
    return jnp.concatenate([full, partial], axis=-1)


def _fold_long(long: Long, pairs: Pairs, steps: Pass, total: Any) -> Any:
    def full_bias(row: Array, block: Array, count: Array) -> Float32[Array, "..."]:
        del row
        return padding_bias(count, len(block), pairs.block_kv)

    def step(total: Any, line: tuple[Array, ...]) -> tuple[Any, None]:
        row, *ends = line
        fixed, state = steps.open(total, row)

        def folded(
            state: Any, chunks: Chunks, span: tuple[Array, Array], bias: Callable
        ) -> Any:
            def fold(at: Int32[Array, ""], state: Any) -> Any:
                block = jnp.asarray(chunks.block)[at]
                count = jnp.asarray(chunks.count)[at]
                masked = bias(row, block, count)
                masked = pairs.with_scores(masked, row, block)
                return steps.fold(fixed, state, block, masked)

            return jax.lax.fori_loop(span[0], span[1], fold, state)

        state = folded(state, long.full, (ends[0], ends[1]), full_bias)
        state = folded(state, long.partial, (ends[2], ends[3]), pairs.bias)
        return steps.close(fixed, state, row), None

    spans = (long.full.begin, long.full.end, long.partial.begin, long.partial.end)
    return jax.lax.scan(step, total, (long.row, *spans))[0]
