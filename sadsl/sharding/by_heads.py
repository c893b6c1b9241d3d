"""Deals heads in place of tokens for one term: two all-to-alls around it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sadsl.run import dropout_seeds
from sadsl.run.attend import attend
from sadsl.run.types import Outcome
from sadsl.sharding.shard import Shard
from sadsl.sharding.whole import arrays_of_all
from sadsl.terms.base import DROPOUT_KEY


def by_heads(term: Any, shard: Shard) -> Outcome:
    """A term on all tokens of some heads on each device.

    The call is an ordinary one, with a plan that is made while it is traced (Jacobs et
    al., DeepSpeed Ulysses, 2023). The heads of q and of k are multiples of the shards.
    """
    shards = shard.shards
    lengths = shards.q_seq_len, shards.kv_seq_len, shards.kv_seq_len
    q, k, v = (
        _exchanged(shard, x, split=2, joined=1)[:, :n]
        for x, n in zip(shard.inputs, lengths, strict=True)
    )
    given = arrays_of_all(term, shard)
    if DROPOUT_KEY in given:
        before = given.get(dropout_seeds.HEAD, jnp.zeros(1, jnp.int32))
        given[dropout_seeds.HEAD] = before + jnp.int32(shard.index * q.shape[2])
    found = attend(term, (q, k, v), given, shard.setting)
    size = shards.count * shards.q_size

    def back(x: Array, tokens: int, heads: int) -> Array:
        pads = [(0, 0)] * x.ndim
        pads[tokens] = (0, size - x.shape[tokens])
        return _exchanged(shard, jnp.pad(x, pads), split=tokens, joined=heads)

    lse = None if found.lse is None else back(found.lse, 2, 1)
    return Outcome(back(found.out, 1, 2), lse)


def _exchanged(shard: Shard, x: Array, *, split: int, joined: int) -> Array:
    """Splits an axis over the devices, and joins another one."""
    return jax.lax.all_to_all(x, shard.axis, split, joined, tiled=True)
