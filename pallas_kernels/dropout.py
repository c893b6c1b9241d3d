"""Dropout on attention weights: which pairs stay, from a key, by integers alone.

Every query of a batch entry and head has a seed, every key position another, and a pair
stays if the mixture of the two is large enough: the same in every pass, for all block
sizes and orders of positions, and bit by bit on every backend. Nothing is stored.

The mixing steps are those of a 32-bit hash with few and even biases (Wellons, Hash
Prospector, 2018: "lowbias32"). All of it is int32, whose products wrap.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

# 0x7feb352d, 0x846ca68b and, from the golden ratio, 0x9e3779b9.
FIRST, SECOND, STEP = 0x7FEB352D, -0x7B935975, -0x61C88647


def mix(x: Any) -> Any:
    """A bijection of int32 under which every bit depends on every other."""
    x = _shifted(_multiply(_shifted(x, 16), FIRST), 15)
    return _shifted(_multiply(x, SECOND), 16)


def query_seeds(
    words: Int32[Array, " words"],
    positions: Int32[Array, "_batch _heads q"],
    batch: Any,
    num_heads: int,
    first: int | Int32[Array, ""] = 0,
) -> Int32[Array, "batch {num_heads} q"]:
    """Of every query, from the words of a key; positions may be shared by all.

    ``first`` is the place of these entries in the whole batch.
    """
    seed = jnp.zeros((), jnp.int32)
    for i in range(words.shape[0]):
        seed = mix(seed * STEP + words[i] + 1)
    entries, heads = (jnp.arange(n, dtype=jnp.int32) + 1 for n in (batch, num_heads))
    seed = mix(seed * STEP + (entries + first))[:, None]
    seed = mix(seed * STEP + heads[None])[..., None]
    return mix(seed + positions * STEP)


def key_seeds(positions: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Of every key."""
    return mix(positions * STEP + 1)


def factor(
    queries: Int32[Array, "..."],
    keys: Int32[Array, "..."],
    rate: float,
    dtype: Any = jnp.float32,
) -> Float[Array, "..."]:
    """What the weights of a tile are multiplied by: 0 or ``1 / (1 - rate)``.

    The seeds broadcast against one another, in either orientation.
    """
    x = _shifted(queries ^ keys, 16)
    x = _shifted(_multiply(x, FIRST), 15)
    # The last step of ``mix`` leaves the high bits as they are, which decide.
    x = _multiply(x, SECOND)
    limit = min(round(rate * 2**32), 2**32 - 1) - 2**31
    kept, none = (jnp.dtype(dtype).type(y) for y in (1 / (1 - rate), 0))
    return jnp.where(x >= limit, kept, none)


def _shifted(x: jax.Array, count: int) -> jax.Array:
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, count))


def _multiply(x: jax.Array, by: int) -> jax.Array:
    return x * by
