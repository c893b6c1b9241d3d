"""Runs a call whole on every device, for terms that cannot be dealt."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sadsl.run.attend import attend
from sadsl.run.types import Outcome
from sadsl.sharding.shard import Shard
from sadsl.terms.base import Spec


def whole(term: Spec, shard: Shard) -> Outcome:
    """The whole call on every device, which keeps the queries of its shard.

    For terms whose output at a query depends on other queries.
    """
    shards = shard.shards
    lengths = shards.q_seq_len, shards.kv_seq_len, shards.kv_seq_len
    inputs = [
        shard.gathered(x, 1, n) for x, n in zip(shard.inputs, lengths, strict=True)
    ]
    given = arrays_of_all(term, shard)
    q, k, v = inputs
    found = attend(term, (q, k, v), given, shard.setting)

    def own(x: Array, axis: int) -> Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, shards.count * shards.q_size - shards.q_seq_len)
        at = shard.first_query
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, pads), at, shards.q_size, axis)

    return Outcome(own(found.out, 1), None if found.lse is None else own(found.lse, 2))


def arrays_of_all(term: Spec, shard: Shard) -> dict[str, Any]:
    """The arrays that a term reads, with the entries of all tokens."""
    given = shard.of(term)
    sizes = {"q": shard.shards.q_seq_len, "k": shard.shards.kv_seq_len}
    for name, (axis, role) in shard.by_token(term).items():
        given[name] = shard.gathered(given[name], axis, sizes[role])
    return given
