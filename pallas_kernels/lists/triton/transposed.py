"""Transposed lists: for each block of keys, the rows that list it.

The pairs of block and row are sorted once by block. The sort is stable, so the order of
pairs is fixed, and with it that of additions.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels.lists.call import num_blocks
from pallas_kernels.lists.triton.launch import GatherSizes
from pallas_kernels.triton.tiles import SMALLEST

# A stretch has at least so many members, so that a program has some steps.
STRETCH = 1024


@dataclass(frozen=True)
class KeySpans:
    """How the pairs of a key head are divided into programs.

    A *span* is ``blocks`` consecutive blocks of keys. A product on tensor cores has at
    least ``SMALLEST`` keys, so blocks of fewer keys share a span. Each query is then
    multiplied with all keys of the span, of which its pair has some, and the rest is
    masked. That takes no longer than a padded product of one block, loads no query more
    often, and the pairs of all blocks fill the steps of one loop. A longer span would
    only compute more masked products.

    A *stretch* is at most ``pairs`` successive pairs of a span, and the work of one
    program. Some keys are in nearly all lists: with one program for each span, theirs
    would run long after all others.
    """

    blocks: int
    keys: int  # blocks * block_kv
    count: int
    pairs: int
    stretches: int  # of all spans of a key head, at most


def spans_of(sizes: GatherSizes) -> KeySpans:
    """The spans of a call; a stretch has at most twice the mean number of pairs."""
    blocks = min(max(1, SMALLEST // sizes.block_kv), sizes.blocks)
    count = num_blocks(sizes.blocks, blocks)
    every = sizes.units_of_key * sizes.rows * sizes.listed
    pairs = max(2 * num_blocks(every, count), num_blocks(STRETCH, sizes.members))
    return KeySpans(
        blocks, blocks * sizes.block_kv, count, pairs, count + every // pairs
    )


class TransposedLists(NamedTuple):
    """Transposed lists of each key head, or of the key heads that share lists; int32.

    Pairs are sorted by block, then by unit and row; those of no block are at the end. A
    row counts over all units that share a key head: ``unit * rows + row``.
    """

    block: Int32[Array, "lists heads pairs"]
    row: Int32[Array, "lists heads pairs"]
    # The span of each stretch, and its first and last pair; no pair beyond the last
    # stretch.
    span: Int32[Array, "lists heads stretches"]
    first: Int32[Array, "lists heads stretches"]
    last: Int32[Array, "lists heads stretches"]
    # The first stretch of each span, and the number of stretches.
    stretch: Int32[Array, "lists heads spans_plus_1"]


def transposed(
    index: Int32[Array, "lists groups rows listed"], sizes: GatherSizes, spans: KeySpans
) -> TransposedLists:
    """The transposed lists of a call."""
    heads = min(sizes.groups, sizes.kv_heads)
    flat = index.reshape(index.shape[0], heads, -1)
    real = (flat >= 0) & (flat < sizes.blocks)
    flat = jnp.where(real, flat, sizes.blocks)
    place = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 2)
    row = jax.lax.div(place, jnp.int32(sizes.listed))
    block, row = jax.lax.sort((flat, row), dimension=2, is_stable=True, num_keys=1)
    edges = jnp.arange(spans.count + 1, dtype=jnp.int32) * spans.blocks
    starts = _searched(block, jnp.minimum(edges, sizes.blocks), "left")
    counts = -(-jnp.diff(starts) // spans.pairs)
    before = jnp.cumsum(counts, axis=2, dtype=jnp.int32)
    stretch = jnp.concatenate([jnp.zeros_like(before[..., :1]), before], axis=2)
    number = jnp.arange(spans.stretches, dtype=jnp.int32)
    span = jnp.minimum(_searched(before, number, "right"), spans.count - 1)
    number = jnp.broadcast_to(number, span.shape)
    at, end, start = (
        jnp.take_along_axis(x, span, 2) for x in (starts, starts[..., 1:], stretch)
    )
    first = jnp.minimum(at + (number - start) * spans.pairs, end)
    return TransposedLists(
        block, row, span, first, jnp.minimum(first + spans.pairs, end), stretch
    )


def _searched(ordered: Array, values: Array, side: str) -> Array:
    """Where ``values [m]`` stand in each row of ``ordered [lists, heads, n]``."""

    def one(x: Array) -> Array:
        return jnp.searchsorted(x, values, side=side, method="scan_unrolled")

    return jax.vmap(jax.vmap(one))(ordered).astype(jnp.int32)


def specs_of(lists: TransposedLists, sizes: GatherSizes) -> TransposedLists:
    """The specs of transposed lists for a grid ``(program, key head, batch)``."""
    shared = max(1, sizes.kv_heads // sizes.groups)

    def spec(x: Array) -> pl.BlockSpec:
        def at(program: Any, head: Any, batch: Any) -> tuple:
            entry = batch if sizes.lists > 1 else 0
            return entry, jax.lax.div(head, jnp.int32(shared)), 0

        return pl.BlockSpec((None, None, x.shape[2]), at)

    return jax.tree.map(spec, lists)
