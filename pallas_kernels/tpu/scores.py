"""What is added to the scores of a tile: windows of pairs, and vectors."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import pair_values
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, PairValues, ScoreValues, Vectors
from pallas_kernels.tpu import operands
from pallas_kernels.tpu.launch import Step, TileOperand
from pallas_kernels.tpu.operands import PairOperands
from pallas_kernels.tpu.runs import TpuSizes

# Rows of a vector register: so many copies of a strip travel, each a place further.
SUBLANES = 8


@dataclass(frozen=True)
class OnTop:
    """How a kernel ``by`` the queries or the keys adds to its scores.

    Tiles are ``[queries, keys]`` or ``[keys, queries]``.
    """

    call: Call
    sizes: TpuSizes
    by: Axis
    diagonal: tuple[bool, ...]  # of each of the pairs

    def __call__(
        self,
        step: Step,
        block: Any,
        values: tuple[tuple, tuple],
        windows: tuple,
        allowed: jax.Array | None,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """What is added to capped scores, and the pairs that it does not leave out.

        None for nothing, and for all pairs. ``values`` are those of the queries and of
        the keys, shaped like their ids; ``allowed`` are the pairs of the map. Where the
        sums of a row tell whether all was finite, a full tile stays without a test: a
        finite score with ``-inf`` has no weight as it is.
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


def on_top(values: ScoreValues, call: Call, sizes: TpuSizes, by: Axis) -> OnTop:
    """What a kernel has to know of the values."""
    return OnTop(call, sizes, by, tuple(x.diagonal for x in values.pairs))


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
    """The values that each tile reads."""
    lengths = sizes.q_seq_len, sizes.kv_seq_len
    blocks = sizes.block_q, sizes.block_kv
    values = x.values
    if by == "kv":
        lengths, blocks = lengths[::-1], blocks[::-1]
        # The other way along a diagonal: from the last query to the last key.
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
    """All pairs, a plane for each block of rows: ``[b, h, planes, rows, columns]``."""
    values = operands.padded(operands.padded(x.values, blocks[0], 2), blocks[1], 3)
    return values.reshape(*values.shape[:2], -1, blocks[0], values.shape[3])


def _strips(
    x: PairValues, lengths: tuple[int, int], blocks: tuple[int, int]
) -> jax.Array:
    """Diagonals ``[b, h, 1, copies, length]``, each copy a place behind the one before.

    A tile is then made of windows that all start within one register.
    """
    strip = pair_values.strip(x, *lengths, block_q=blocks[0], block_kv=blocks[1])
    copies = math.gcd(blocks[0], SUBLANES)
    length = strip.shape[2]
    strip = jnp.pad(strip, ((0, 0), (0, 0), (0, copies - 1)))
    shifted = [strip[..., copies - 1 - i :][..., :length] for i in range(copies)]
    return jnp.stack(shifted, axis=2)[:, :, None]


def _tile(ref: Any, rows: int, columns: int) -> jax.Array:
    """The tile of a window ``[copies, rows + columns]`` of strips."""
    copies, window = ref.shape[0], ref[...]
    starts = range(rows - copies, -1, -copies)
    return jnp.concatenate([window[:, at : at + columns] for at in starts], axis=0)
