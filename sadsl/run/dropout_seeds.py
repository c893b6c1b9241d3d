"""Computes the dropout seeds of queries and keys from a random key."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lowering.order.candidates import Layouts
from lowering.problem import Problem
from lowering.run_time.sort import Orders
from pallas_kernels import dropout
from pallas_kernels.call import Seeds, Vectors
from sadsl.terms.base import DROPOUT_KEY

# The name of the array that holds, for a part of a batch, the index of each entry in
# the whole batch.
ENTRY = "dropout.entry"
# The names of arrays that hold, for a shard of a call, the position of each query and
# of each key, and the index of its first head.
QUERIES, KEYS, HEAD = "dropout.queries", "dropout.keys", "dropout.head"
NAMES = DROPOUT_KEY, ENTRY, QUERIES, KEYS, HEAD


def key_words(key: Any) -> Int32[Array, " words"]:
    """The words of a ``jax.random`` key, typed or raw uint32, as int32.

    Raises:
      ValueError: ``key`` is not a key, or is an array of several keys.
    """
    key = jnp.asarray(key)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(key) if typed else key
    if data.dtype != jnp.uint32 or data.ndim != 1:
        raise ValueError(
            f"dropout_key has dtype {key.dtype} and shape {key.shape}: pass one key, "
            "as jax.random.key(0) makes it"
        )
    return jax.lax.bitcast_convert_type(data, jnp.int32)


def of_part(given: Mapping[str, Any], part: int) -> Mapping[str, Any]:
    """The arrays of part number ``part`` of a spec, with its own dropout key.

    That key is ``jax.random.fold_in(key, part)``. So it depends only on the key of the
    call and the place of the part in the spec, and is the same on every backend.
    """
    if DROPOUT_KEY not in given:
        return given
    key = given[DROPOUT_KEY]
    key_words(key)  # Raises ValueError if it is not one key.
    return {**given, DROPOUT_KEY: jax.random.fold_in(key, part)}


def at_places(given: Mapping[str, Any], q: Array, kv: Array) -> dict[str, Any]:
    """The positions of the queries and keys of a shard; empty without dropout.

    Both are int32 ``[seq]``.
    """
    if DROPOUT_KEY not in given:
        return {}
    return {QUERIES: q[None], KEYS: kv[None]}


def with_seeds(
    vectors: Vectors,
    arrays: Mapping[str, Array],
    batch: int,
    problem: Problem,
    order: Layouts | Orders | None,
) -> Vectors:
    """Adds the dropout seeds of queries and keys to ``vectors``, in slot order.

    A slot takes the seed of the position that it holds, so the order of positions does
    not change which weights are dropped.
    """
    q, kv = (x[None, None] for x in _positions(problem, arrays))
    match order:
        case Layouts():
            q, kv = order.q.to_slots(q, 2), order.kv.to_slots(kv, 2)
        case Orders():
            q, kv = order.q + problem.q_offset, order.kv
    queries = _query_seeds(arrays, q, batch, problem)
    return vectors._replace(seeds=Seeds(queries, dropout.key_seeds(kv)))


def of_all_pairs(
    arrays: Mapping[str, Array], batch: int, problem: Problem, rate: float, dtype: Any
) -> Float[Array, "batch heads q kv"]:
    """The factor of every weight: 0 or ``1 / (1 - rate)``."""
    q, kv = (x[None, None] for x in _positions(problem, arrays))
    seeds = _query_seeds(arrays, q, batch, problem)
    keys = dropout.key_seeds(kv)
    return dropout.factor(seeds[..., :, None], keys[..., None, :], rate, dtype)


def _query_seeds(
    arrays: Mapping[str, Array], positions: Array, batch: int, problem: Problem
) -> Array:
    words, heads = arrays[DROPOUT_KEY], problem.num_heads
    first = arrays[ENTRY][0] if ENTRY in arrays else 0
    head = arrays[HEAD][0] if HEAD in arrays else 0
    return dropout.query_seeds(words, positions, batch, heads, (first, head))


def _positions(problem: Problem, arrays: Mapping[str, Array]) -> tuple[Array, ...]:
    q = jnp.arange(problem.q_seq_len, dtype=jnp.int32) + problem.q_offset
    kv = jnp.arange(problem.kv_seq_len, dtype=jnp.int32)
    return tuple(
        arrays[name][0] if name in arrays else x
        for name, x in ((QUERIES, q), (KEYS, kv))
    )
