"""Arranges ``PairValues`` into tiles, the same way on every backend.

A tile of a diagonal array is a Toeplitz matrix: its value depends on ``k - q`` alone.
So a strip of ``block_q + block_kv`` values holds the whole tile.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.call import PairValues


def strip(
    x: PairValues, q_seq_len: int, kv_seq_len: int, *, block_q: int, block_kv: int
) -> jax.Array:
    """A diagonal array sorted by ``k - q`` and padded to whole blocks.

    Returns ``[batch or 1, heads or 1, length]``. The value of the pair ``(q, k)`` is at
    ``k - q + num_q_blocks * block_q - 1``. The tile of query block ``i`` and key block
    ``j`` is the strip of ``block_q + block_kv`` values that starts at ``(num_q_blocks -
    1 - i) * block_q + j * block_kv``. Values that belong to no pair are 0.
    """
    assert x.diagonal
    before = -q_seq_len % block_q
    after = -kv_seq_len % block_kv + 1
    values = jnp.flip(x.values, axis=-1)
    return jnp.pad(values, ((0, 0), (0, 0), (before, after)))


def toeplitz(window: jax.Array, rows: int, columns: int) -> jax.Array:
    """The tile ``[..., rows, columns]`` of ``window[..., rows - 1 - row + column]``.

    The window has ``rows + columns`` values. Only reshapes and slices build the tile,
    so the transpose sums along diagonals without a scatter.
    """
    *lead, length = window.shape
    assert length == rows + columns
    # The flat copies have period `length`. A row of length - 1 starts one earlier
    # in the period than the row before.
    spread = jnp.broadcast_to(window[..., None, :], (*lead, rows + 1, length))
    flat = spread.reshape(*lead, (rows + 1) * length)
    flat = jax.lax.slice_in_dim(flat, rows - 1, rows - 1 + rows * (length - 1), axis=-1)
    return flat.reshape(*lead, rows, length - 1)[..., :columns]


def of_all(x: PairValues, q_seq_len: int, kv_seq_len: int) -> jax.Array:
    """The values of all pairs, ``[batch or 1, heads or 1, q, kv]``."""
    if not x.diagonal:
        return x.values
    window = strip(x, q_seq_len, kv_seq_len, block_q=q_seq_len, block_kv=kv_seq_len)
    return toeplitz(window, q_seq_len, kv_seq_len)
