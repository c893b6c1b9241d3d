"""Values of pairs as arrays: what every backend makes of ``PairValues``.

The tile of a diagonal array has one value for each difference of its row and column: a
strip as long as a row and a column together holds it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.call import PairValues


def strip(
    x: PairValues, q_seq_len: int, kv_seq_len: int, *, block_q: int, block_kv: int
) -> jax.Array:
    """Diagonals for whole blocks, by ``k - q``: of every tile a strip of them.

    ``[batch or 1, heads or 1, length]``, where the value of ``q`` and ``k`` is at
    ``k - q + num_q_blocks * block_q - 1``: the tile of query block ``i`` and key block
    ``j`` reads ``block_q + block_kv`` of them, from ``(num_q_blocks - 1 - i) * block_q
    + j * block_kv``. What belongs to no pair is 0.
    """
    assert x.diagonal
    before = -q_seq_len % block_q
    after = -kv_seq_len % block_kv + 1
    values = jnp.flip(x.values, axis=-1)
    return jnp.pad(values, ((0, 0), (0, 0), (before, after)))


def toeplitz(window: jax.Array, rows: int, columns: int) -> jax.Array:
    """The tile ``[..., rows, columns]`` of ``window[..., rows - 1 - row + column]``.

    The window has ``rows + columns`` values. Built without a gather, so that its
    transpose adds along diagonals without a scatter.
    """
    *lead, length = window.shape
    assert length == rows + columns
    # Rows of one less than the period fall back by one from row to row.
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
