"""The loop over rows of blocks that all passes share.

A short row is processed in one step, a long row in chunks of blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.xla.tile import Pairs, Shown, real_keys, shown
from pallas_kernels.xla.walk_types import Chunks, Long, Short, Walk

# fold(add, state) -> state, over the tiles of one row.
Fold: TypeAlias = Callable[[Callable[[Any, Any], Any], Any], Any]
# blocks(make) -> fold, where make(block, shown) -> tile.
Blocks: TypeAlias = Callable[[Callable[[Array, Shown], Any]], Fold]


class Pass(NamedTuple):
    """The three steps of a pass on one row of query blocks.

    ``row`` is an int32 scalar, ``block`` int32 ``[slots]``. ``total`` holds the results
    of all rows.
    """

    # start(total, row) -> (fixed, state): the constants of the row and its first state.
    start: Callable[[Any, Array], tuple[Any, Any]]
    # fold(fixed, state, block, shown) -> state, for some blocks and their pairs.
    fold: Callable[[Any, Any, Array, Shown], Any]
    # close(fixed, state, row) -> total
    close: Callable[[Any, Any, Array], Any]


def fold_rows(walk: Walk, pairs: Pairs, steps: Pass, total: Any) -> Any:
    """Applies ``steps`` to all rows of ``walk`` and returns the last ``total``."""

    def run(total: Any, row: Array, blocks: Blocks) -> Any:
        fixed, state = steps.start(total, row)
        fold = blocks(lambda block, shown: (block, shown))
        state = fold(lambda state, at: steps.fold(fixed, state, *at), state)
        return steps.close(fixed, state, row)

    return each_row(walk, pairs, run, total)


def each_row(
    walk: Walk, pairs: Pairs, run: Callable[[Any, Array, Blocks], Any], total: Any
) -> Any:
    """Sets ``total = run(total, row, blocks)`` for each row of ``walk``, in turn.

    ``fold = blocks(make)`` prepares the tiles of the row, and ``fold(add, state)`` sets
    ``state = add(state, make(block, shown))`` for some blocks at a time. A row may be
    folded several times. A short row then makes its one tile once; a long row makes its
    tiles anew each time, which keeps memory linear.
    """
    for short in walk.short:
        total = _each_short(short, pairs, run, total)
    return total if walk.long is None else _each_long(walk.long, pairs, run, total)


def _each_short(short: Short, pairs: Pairs, run: Callable, total: Any) -> Any:
    def step(total: Any, line: tuple[Array, ...]) -> tuple[Any, None]:
        row, block, *_ = line

        def blocks(make: Callable) -> Callable:
            tile = pairs.with_scores(row_tile(short, pairs, line), row, block)
            made = make(block, tile)
            return lambda add, state: add(state, made)

        return run(total, row, blocks), None

    lines = (short.row, short.block, short.num_full, short.num_partial)
    return jax.lax.scan(step, total, lines)[0]


def row_tile(short: Short, pairs: Pairs, line: tuple[Array, ...]) -> Shown:
    """The pairs of one short row; only partial blocks evaluate the predicate."""
    row, block, num_full, num_partial = line
    slots, full_slots = block.shape[0], short.full_slots
    full = real_keys(num_full, full_slots, pairs.block_kv)
    if full_slots == slots:
        # Padding repeats a full block.
        return shown(full, padding=True)
    partial = shown(pairs.real(row, block[full_slots:], num_partial))
    if not full_slots:
        return partial
    # One tile of both kinds: the row takes one matrix product and one softmax.
    full = shown(jnp.broadcast_to(full, (*partial.limit.shape[:3], 1, full.shape[-1])))
    limit = jnp.broadcast_to(
        full.limit, (*partial.limit.shape[:-1], full.limit.shape[-1])
    )
    assert full.seen is not None
    assert partial.seen is not None
    return Shown(
        jnp.concatenate([limit, partial.limit], axis=-1),
        jnp.concatenate([full.seen, partial.seen], axis=-1),
    )


def _each_long(long: Long, pairs: Pairs, run: Callable, total: Any) -> Any:
    def full(row: Array, block: Array, count: Array) -> Shown:
        del row
        real = real_keys(count, len(block), pairs.block_kv)
        return shown(real, padding=True)

    def partial(row: Array, block: Array, count: Array) -> Shown:
        return shown(pairs.real(row, block, count))

    def step(total: Any, line: tuple[Array, ...]) -> tuple[Any, None]:
        row, *ends = line

        def blocks(make: Callable) -> Callable:
            def fold(add: Callable, state: Any) -> Any:
                state = over(long.full, (ends[0], ends[1]), full, add, state)
                return over(long.partial, (ends[2], ends[3]), partial, add, state)

            def over(
                chunks: Chunks,
                span: tuple[Array, Array],
                tile: Callable,
                add: Callable,
                state: Any,
            ) -> Any:
                def one(at: Int32[Array, ""], state: Any) -> Any:
                    block = jnp.asarray(chunks.block)[at]
                    count = jnp.asarray(chunks.count)[at]
                    here = pairs.with_scores(tile(row, block, count), row, block)
                    return add(state, make(block, here))

                return jax.lax.fori_loop(span[0], span[1], one, state)

            return fold

        return run(total, row, blocks), None

    spans = (long.full.begin, long.full.end, long.partial.begin, long.partial.end)
    return jax.lax.scan(step, total, (long.row, *spans))[0]
