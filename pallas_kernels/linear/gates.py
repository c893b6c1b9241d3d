"""Decay factors of a chunk: one log-decay per position, or one per key channel too.

Let ``G_i`` be the sum of the log-decays up to and including position ``i`` of a chunk.
A product over the pairs of a chunk is

    pairs(x, y)[i, j] = sum_c x[i, c] y[j, c] exp(G[i, c] - G[j, c])        for j <= i

No exponent is above 0, and no sum loses digits under strong decay:

- By head (Sun et al., Retentive Network, 2023, section 2), ``G`` is kept as an exact
  coarse part and a small fine part (``marks.of_chunks``).
- By channel (Yang et al., Gated Linear Attention, 2024, section 4), the factor must be
  split between ``x`` and ``y``. Take the smallest block of ``2 b`` rows that holds both
  positions: the border between its halves lies between them. ``x`` takes the decay
  since that border, and ``y`` the decay up to it. Both are sums of numbers of one sign.
  There is one product for each ``b`` = 1, 2, 4, ...
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.linear.marks import Marks, Pair
from pallas_kernels.linear.products import Ops, column_index, number, row_index


class Decay(NamedTuple):
    """The decay factors of a chunk; a factor of None is 1.

    Attributes:
      reads: from the chunk's start to each row, ``[chunk, 1 or features]``.
      reads_before: the same without the row's own decay; None by head.
      writes: from each row to the chunk's end.
      whole: of the whole chunk, as ``[1 or features, 1]`` and ``[1, 1 or features]``.
      pairs: ``pairs(x, y, before)``: see above, 0 above the diagonal. With ``before``,
        ``x`` leaves out the decay of its own row, and the diagonal is 0 too. ``x`` may
        have several times the rows of ``y``: then each ``chunk`` of them is a member.
    """

    reads: Any
    reads_before: Any
    writes: Any
    whole: Pair | None
    pairs: Callable[[Any, Any, bool], Any]


def decay_of(gate: Any, marks: Marks, ops: Ops) -> Decay:
    """The decay of a chunk, from log-decays by channel, by head, or without any."""
    if gate is not None:
        return _by_channel(gate, ops)
    if marks.fine is not None and marks.coarse is not None:
        return _by_head(marks.fine, marks.coarse, ops)

    def pairs(x: Any, y: Any, before: bool) -> Any:
        return _lower(ops.dot(x, y, (1, 1)), before)

    return Decay(None, None, None, None, pairs)


def times(x: Any, factor: Any) -> Any:
    """``x [members * chunk, features] * factor [chunk, 1 or features]``."""
    if factor is None:
        return x
    if x.shape[0] == factor.shape[0]:
        return x * factor
    members = x.reshape(-1, factor.shape[0], x.shape[1])
    return (members * factor[None]).reshape(x.shape)


def place(shape: tuple[int, int]) -> Any:
    """The place in its chunk of each row of scores ``[members * chunk, chunk]``."""
    row, chunk = row_index(shape), shape[1]
    if shape[0] == chunk:
        return row
    return jnp.broadcast_to(
        row_index((chunk, chunk))[None], (shape[0] // chunk, chunk, chunk)
    ).reshape(shape)


def _lower(scores: Any, before: bool) -> Any:
    row, column = place(scores.shape), column_index(scores.shape)
    seen = column < row if before else column <= row
    return jnp.where(seen, scores, number(0.0, scores))


# --- one log-decay per position ---


def _by_head(fine: Pair, coarse: Pair, ops: Ops) -> Decay:
    end = _last(coarse.row), _last(fine.row)

    def pairs(x: Any, y: Any, before: bool) -> Any:
        assert not before
        chunk = y.shape[0]
        seen = column_index((chunk, chunk)) <= row_index((chunk, chunk))
        past = coarse.col - coarse.row
        past += fine.col - fine.row
        # Both selections are needed: the gradient flows through factor and product.
        factor = jnp.exp(jnp.where(seen, past, number(0.0, past)))
        return _lower(times(ops.dot(x, y, (1, 1)), factor), before)

    whole = jnp.exp(end[0] + end[1])
    writes = jnp.exp((end[0] - coarse.col) + (end[1] - fine.col))
    reads = jnp.exp(coarse.col + fine.col)
    return Decay(reads, None, writes, Pair(whole, whole), pairs)


def _last(row: Any) -> Any:
    """The last entry of ``[1, chunk]``, as ``[1, 1]``."""
    # Not every backend can index a value; all can sum.
    end = column_index(row.shape) == row.shape[1] - 1
    return jnp.sum(jnp.where(end, row, number(0.0, row)), axis=1, keepdims=True)


# --- one log-decay per position and key channel ---


class _Sums(NamedTuple):
    """Sums of log-decays ``[chunk, features]`` within blocks of ``b`` rows.

    ``upto`` is the sum from the start of the row's block to the row, ``before`` leaves
    out the row itself, and ``after`` is the sum of the rows behind it in its block.
    """

    upto: Any
    before: Any
    after: Any


def _by_channel(gate: Any, ops: Ops) -> Decay:
    *levels, whole = _levels(gate, ops)
    total = jnp.exp(jnp.sum(gate, axis=0, keepdims=True))

    def pairs(x: Any, y: Any, before: bool) -> Any:
        shape = x.shape[0], y.shape[0]
        row, column = place(shape), column_index(shape)
        apart = row ^ column
        own = jnp.sum(times(x, y), axis=1, keepdims=True)
        found = jnp.where((apart == 0) & (not before), own, number(0.0, own))
        for level, sums in enumerate(levels):
            since = jnp.exp(sums.before if before else sums.upto)
            until = jnp.exp(sums.after)
            here = (column < row) & (apart >> level == 1)
            product = ops.dot(times(x, since), y * until, (1, 1))
            found += jnp.where(here, product, number(0.0, product))
        return found

    return Decay(
        jnp.exp(whole.upto),
        jnp.exp(whole.before),
        jnp.exp(whole.after),
        Pair(ops.column(total), total),
        pairs,
    )


def _levels(gate: Any, ops: Ops) -> list[_Sums]:
    """The sums within blocks of 1, 2, 4, ... rows; the last block is the chunk."""
    chunk = gate.shape[0]
    assert chunk & (chunk - 1) == 0
    zero = number(0.0, gate)
    sums = _Sums(gate, jnp.zeros_like(gate), jnp.zeros_like(gate))
    total, half, found = gate, 1, [sums]
    while half < chunk:
        second = (row_index(gate.shape) & half) != 0
        other = ops.swapped(total, half)
        ahead, behind = jnp.where(second, other, zero), jnp.where(second, zero, other)
        sums = _Sums(sums.upto + ahead, sums.before + ahead, sums.after + behind)
        total, half = total + other, 2 * half
        found.append(sums)
    return found
