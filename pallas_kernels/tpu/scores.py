"""Computes the values that a TPU kernel adds to the scores of a tile."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import pair_values
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, PairValues, ScoreValues, Vectors
from pallas_kernels.tpu import operands
from pallas_kernels.tpu.operands import PairOperands
from pallas_kernels.tpu.runs import TpuSizes
from pallas_kernels.tpu.walk import Step, TileOperand

# The rows (sublanes) of a vector register, and the number of shifted copies of a strip.
SUBLANES = 8


@dataclass(frozen=True)
class AddedScores:
    """The function that adds to the scores of a tile.

    Tiles are ``[queries, keys]`` if ``by == "q"`` and ``[keys, queries]`` if "kv".
    """

    call: Call
    sizes: TpuSizes
    by: Axis
    diagonal: tuple[bool, ...]  # of each of ScoreValues.pairs

    def __call__(
        self,
        step: Step,
        block: Any,
        values: tuple[tuple, tuple],
        windows: tuple,
        allowed: jax.Array | None,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """The values to add to capped scores, and the pairs that they do not remove.

        ``values`` are the score values of the queries and of the keys, shaped like
        their ids. ``windows`` are refs, one for each of ``ScoreValues.pairs``.
        ``allowed`` are the pairs of the map. Returns None instead of values if nothing
        is added, and None instead of pairs if all are allowed.

        The kernels with rows of queries check the sums of a row for finiteness. There a
        full tile needs no test: the sum of a finite score and ``-inf`` has weight 0.
        """
        if self.call.scores is None:
            return None, allowed
        sizes = self.sizes
        row_size, size = sizes.block_q, sizes.block_kv
        if self.by == "kv":
            row_size, size = size, row_size
        ids = operands.column_ids(step.row, row_size), operands.row_ids(block, size)
        q_ids, k_ids = ids if self.by == "q" else ids[::-1]
        pairs = tuple(
            _tile(ref, row_size, size) if diagonal else ref[...]
            for ref, diagonal in zip(windows, self.diagonal, strict=True)
        )
        added = self.call.scores(q_ids, k_ids, *values, pairs)
        told_later = allowed is None and self.by == "q"
        if told_later or not (any(values) or windows):
            return added, allowed
        kept = jnp.broadcast_to(added > -jnp.inf, (row_size, size))
        if sizes.q_seq_len % sizes.block_q:
            kept &= q_ids < sizes.q_seq_len
        return added, kept if allowed is None else kept & allowed


def added_scores(
    values: ScoreValues, call: Call, sizes: TpuSizes, by: Axis
) -> AddedScores:
    """The ``AddedScores`` of a kernel with rows ``by`` "q" or "kv"."""
    return AddedScores(call, sizes, by, tuple(x.diagonal for x in values.pairs))


def pair_operands(
    vectors: Vectors,
    sizes: TpuSizes,
    batch_and_heads: tuple[int, int],
    members: int,
    *,
    by: Axis,
) -> PairOperands:
    """The operands of which each tile reads its own part."""
    args = sizes, batch_and_heads, members
    return PairOperands(
        tuple(operands.word_operand(x, *args, by=by) for x in vectors.bits),
        tuple(_operand(x, *args, by=by) for x in vectors.scores.pairs),
    )


def _operand(
    x: PairValues,
    sizes: TpuSizes,
    batch_and_heads: tuple[int, int],
    members: int,
    *,
    by: Axis,
) -> TileOperand:
    """The operand of one of ``ScoreValues.pairs``."""
    lengths = sizes.q_seq_len, sizes.kv_seq_len
    blocks = sizes.block_q, sizes.block_kv
    values = x.values
    if by == "kv":
        lengths, blocks = lengths[::-1], blocks[::-1]
        # With the roles of q and k exchanged, the diagonals are in reverse order.
        values = jnp.flip(values, 2) if x.diagonal else jnp.swapaxes(values, 2, 3)
    x = PairValues(values, x.diagonal)
    head_of = operands.head_of_array(values.shape[:2], batch_and_heads, members)
    array = _strips(x, lengths, blocks) if x.diagonal else _rows(x, blocks)
    last = -(-lengths[0] // blocks[0]) - 1

    def window_of(row: Any, block: Any) -> tuple[Any, Any]:
        if x.diagonal:
            return 0, (last - row) * blocks[0] + block * blocks[1]
        return row, block * blocks[1]

    return TileOperand(
        array.reshape(-1, *array.shape[2:]),
        head_of,
        window_of,
        width=blocks[0] + blocks[1] if x.diagonal else blocks[1],
        step=math.gcd(*blocks) if x.diagonal else blocks[1],
    )


def _rows(x: PairValues, blocks: tuple[int, int]) -> jax.Array:
    """All pairs, one plane per block of rows: ``[b, h, planes, rows, columns]``."""
    values = operands.padded(operands.padded(x.values, blocks[0], 2), blocks[1], 3)
    return values.reshape(*values.shape[:2], -1, blocks[0], values.shape[3])


def _strips(
    x: PairValues, lengths: tuple[int, int], blocks: tuple[int, int]
) -> jax.Array:
    """A diagonal array as ``[b, h, 1, copies, length]``, each copy shifted by one more.

    Row ``r`` of a tile reads copy ``r % copies``, so that all rows of a register start
    at the same index.
    """
    strip = pair_values.strip(x, *lengths, block_q=blocks[0], block_kv=blocks[1])
    copies = math.gcd(blocks[0], SUBLANES)
    length = strip.shape[2]
    strip = jnp.pad(strip, ((0, 0), (0, 0), (0, copies - 1)))
    shifted = [strip[..., copies - 1 - i :][..., :length] for i in range(copies)]
    return jnp.stack(shifted, axis=2)[:, :, None]


def _tile(ref: Any, rows: int, columns: int) -> jax.Array:
    """The tile ``[rows, columns]`` of a window ``[copies, rows + columns]``."""
    copies, window = ref.shape[0], ref[...]
    starts = range(rows - copies, -1, -copies)
    return jnp.concatenate([window[:, at : at + columns] for at in starts], axis=0)
