"""Dropout on attention weights: decides from integer seeds which pairs stay.

Every query has a seed for its batch entry, head and position. Every key has a seed for
its position. A pair stays if a hash of both seeds is large enough. So no mask is
stored, and the same pairs stay in every pass, for every block size and order of
positions, bit by bit on every backend.

The hash is "lowbias32" (Wellons, Hash Prospector, 2018), a 32-bit hash with a low bias.
All arithmetic is int32, whose products wrap around.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

# 0x7feb352d, 0x846ca68b and, from the golden ratio, 0x9e3779b9.
FIRST, SECOND, STEP = 0x7FEB352D, -0x7B935975, -0x61C88647


def mix(x: Any) -> Any:
    """The hash lowbias32: a bijection of int32 that mixes all bits."""
    x = _shifted(_multiply(_shifted(x, 16), FIRST), 15)
    return _shifted(_multiply(x, SECOND), 16)


def query_seeds(
    words: Int32[Array, " words"],
    positions: Int32[Array, "_batch _heads q"],
    batch: Any,
    num_heads: int,
    first: tuple[int | Int32[Array, ""], int | Int32[Array, ""]] = (0, 0),
) -> Int32[Array, "batch {num_heads} q"]:
    """Seed of each query, int32, from the ``words`` of a random key.

    ``positions`` may have size 1 along batch and heads. ``first`` are the indices of
    the first batch entry and of the first head here, in the whole call.
    """
    seed = jnp.zeros((), jnp.int32)
    for i in range(words.shape[0]):
        seed = mix(seed * STEP + words[i] + 1)
    entries, heads = (jnp.arange(n, dtype=jnp.int32) + 1 for n in (batch, num_heads))
    seed = mix(seed * STEP + (entries + first[0]))[:, None]
    seed = mix(seed * STEP + (heads + first[1])[None])[..., None]
    return mix(seed + positions * STEP)


def key_seeds(positions: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Seed of each key position, int32, shaped like ``positions``."""
    return mix(positions * STEP + 1)


def factor(
    queries: Int32[Array, "..."],
    keys: Int32[Array, "..."],
    rate: float,
    dtype: Any = jnp.float32,
) -> Float[Array, "..."]:
    """The factor of each weight of a tile: 0 or ``1 / (1 - rate)``.

    The seeds broadcast against each other: ``[q, 1]`` with ``[1, k]``, or ``[1, q]``
    with ``[k, 1]``.
    """
    x = _shifted(queries ^ keys, 16)
    x = _shifted(_multiply(x, FIRST), 15)
    # The last step of ``mix`` does not change the high bits, which decide.
    x = _multiply(x, SECOND)
    limit = min(round(rate * 2**32), 2**32 - 1) - 2**31
    kept, none = (jnp.dtype(dtype).type(y) for y in (1 / (1 - rate), 0))
    return jnp.where(x >= limit, kept, none)


def _shifted(x: jax.Array, count: int) -> jax.Array:
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, count))


def _multiply(x: jax.Array, by: int) -> jax.Array:
    return x * by
