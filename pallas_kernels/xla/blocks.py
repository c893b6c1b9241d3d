"""Splits arrays into blocks of positions, and query heads into groups per key head."""

import jax
import jax.numpy as jnp

from pallas_kernels.xla.heads import HeadGroup, pick


def to_blocks(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    """Splits ``axis`` into ``[blocks, size]``, padded with ``fill`` at the end."""
    short = -x.shape[axis] % size
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, short)
    x = jnp.pad(x, widths, constant_values=fill) if short else x
    blocks = x.shape[axis] // size
    return x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])


def from_blocks(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Undoes ``to_blocks``."""
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def fold_heads(x: jax.Array, heads: HeadGroup) -> jax.Array:
    """Picks ``heads`` of ``x`` as ``[batch, kv_heads, group, ...]``."""
    x = pick(x, heads.q_heads)
    return x.reshape(x.shape[0], len(heads.kv_heads), -1, *x.shape[2:])


def fold_if_own(x: jax.Array, heads: HeadGroup) -> jax.Array:
    """``fold_heads``, or ``[batch, 1, 1, ...]`` if all heads share one entry."""
    return fold_heads(x, heads) if x.shape[1] > 1 else x[:, :, None]
