"""Computes the ``Marks`` of chunks: cumulative log-decays, and counts of resets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# The strongest log-decay: a factor of exp(-60) = 9e-27 is below the precision of f32.
STRONGEST = -60.0
# The coarse part of a log-decay is a multiple of this. Its sum over a chunk then fits
# the 24 bits of an f32 exactly, and the sum of the fine parts is at most 1/2.
GRAIN = 2.0**-9
LONGEST_CHUNK = 512


class Pair(NamedTuple):
    """The same number per position of a chunk, as a column and as a row."""

    col: Any  # [chunk, 1]
    row: Any  # [1, chunk]


class Marks(NamedTuple):
    """The decays and resets at the positions of a chunk: a ``Pair`` each, or None.

    ``coarse + fine`` is the sum of the log-decays from the start of the chunk up to and
    including the position. ``coarse`` is exact, and ``fine`` is so small that the
    difference of two has a negligible rounding error (``of_chunks``). ``run`` is the
    number of resets of the state in the chunk so far.
    """

    fine: Any = None
    coarse: Any = None
    run: Any = None


def clipped(log_decay: Any) -> Any:
    """Log-decays of at least ``STRONGEST``; the gradient at the bound is whole."""
    return jnp.where(log_decay < STRONGEST, STRONGEST, log_decay)


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
        decay = clipped(log_decay)
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
