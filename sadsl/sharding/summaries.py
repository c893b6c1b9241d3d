"""``summaries`` over shards: regions are made where their tokens are, then gathered."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowering.partition.shards import Shards
from sadsl.run import dropout_seeds, traced_offset
from sadsl.run.over import over_entries
from sadsl.run.summaries import INHABITED, SOME, for_heads, regions_of
from sadsl.run.types import Outcome
from sadsl.sharding.attend import attend_shard
from sadsl.sharding.shard import Shard
from sadsl.sharding.whole import whole
from sadsl.terms.base import is_dropout
from sadsl.terms.moved import OFFSET
from sadsl.terms.summaries import Summaries


@attend_shard.register
def _(term: Summaries, shard: Shard) -> Outcome:
    """The regions of all shards, each made by its own; else the whole call."""
    shards, partition = shard.shards, term.partition
    n = shards.kv_seq_len
    if not makes_own_regions(term, shards):
        return whole(term, shard)
    partition.check(n)
    found = regions_of(term, shard.inputs, {}, shard.setting, _there(term, shard))
    count = partition.num_regions(n)
    keys, values = (shard.gathered(x, 1, count) for x in (found.keys, found.values))
    seen, q = partition.seen(n), shard.inputs[0]
    read: dict[str, Any] = {n: x for n, x in shard.given.items() if is_dropout(n)}
    if term.valid is not None:
        seen &= INHABITED
        read[SOME] = shard.gathered(found.operands[SOME], 1, count)
    entries = jnp.arange(count, dtype=jnp.int32)
    read |= dropout_seeds.at_places(shard.given, shard.query_positions, entries)
    read[OFFSET] = shard.first_query
    placed = traced_offset.moved_map(seen, read)
    return over_entries(placed, (q, for_heads(keys, q), values), read, shard.setting)


def makes_own_regions(term: Summaries, shards: Shards) -> bool:
    """Whether shards make regions of their own tokens alone.

    A caller's function takes all tokens at once, so terms with one run whole.
    """
    own = shards.aligned and term.partition.divides(shards.kv_size)
    return own and not term.callables


def _there(term: Summaries, shard: Shard) -> Array | None:
    """Which tokens of the shard there are, bool ``[batch or 1, size]``; None: all."""
    shards = shard.shards
    length = shards.count * shards.kv_size
    if term.valid is None and length == shards.kv_seq_len:
        return None
    # Every device has the whole array of a caller.
    given = (
        jnp.ones((1, shards.kv_seq_len), bool)
        if term.valid is None
        else shard.given[term.valid].astype(bool)
    )
    padded = jnp.pad(given, ((0, 0), (0, length - shards.kv_seq_len)))
    return jax.lax.dynamic_slice_in_dim(padded, shard.first_key, shards.kv_size, 1)
