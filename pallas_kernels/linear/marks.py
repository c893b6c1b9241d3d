"""Computes the ``Marks`` of chunks: cumulative log-decays, and counts of resets."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.linear.algebra import Marks, Pair

# The strongest log-decay: a factor of exp(-60) = 9e-27 is below the precision of f32.
STRONGEST = -60.0
# The coarse part of a log-decay is a multiple of this. Its sum over a chunk then fits
# the 24 bits of an f32 exactly, and the sum of the fine parts is at most 1/2.
GRAIN = 2.0**-9
LONGEST_CHUNK = 512


def of_chunks(
    log_decay: Float[Array, "heads padded"] | None,
    starts: Bool[Array, "heads padded"] | None,
    chunk: int,
    dtype: Any = jnp.float32,
) -> Marks:
    """The marks of all chunks, arrays ``[heads, chunks, chunk]``.

    A log-decay below -60 counts as -60. The gradient flows through ``fine`` alone.
    """
    assert chunk <= LONGEST_CHUNK
    fine = coarse = run = None
    if log_decay is not None:
        decay = jnp.clip(log_decay, STRONGEST, 0.0)
        grains = jax.lax.stop_gradient(jnp.round(decay / GRAIN) * GRAIN)
        coarse = _summed(grains, chunk)
        fine = _summed(decay - grains, chunk)
    if starts is not None:
        run = _summed(starts.astype(dtype), chunk)
    return Marks(fine, coarse, run)


def _summed(x: jax.Array, chunk: int) -> jax.Array:
    heads, padded = x.shape
    return jnp.cumsum(x.reshape(heads, padded // chunk, chunk), axis=2)


def pairs(marks: Marks) -> Marks:
    """Marks ``[..., chunk]`` as a ``Pair`` of columns and rows each."""

    def pair(x: Any) -> Pair | None:
        return None if x is None else Pair(x[..., :, None], x[..., None, :])

    return Marks(*map(pair, marks))
