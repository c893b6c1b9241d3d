"""Moves chunks of queries between shards, so that devices have equal work."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowering.partition.balance import CHUNKS, Balance
from sadsl.run.types import Outcome
from sadsl.sharding.shard import Shard
from sadsl.terms.moved import of_queries


@dataclass(frozen=True)
class MovedQueries:
    """A shard with the queries of its chunks, and where they came from."""

    shard: Shard
    balance: Balance

    def back(self, found: Outcome) -> Outcome:
        """The outcome of the queries that the shard had before."""
        out = _sent(self.shard, found.out, 1, self.balance, home=True)
        lse = None
        if found.lse is not None:
            lse = _sent(self.shard, found.lse, 2, self.balance, home=True)
        return Outcome(out, lse)


def moved(shard: Shard, balance: Balance) -> MovedQueries:
    """The shard with the queries that it works on, and their arrays."""
    q, k, v = shard.inputs
    given = dict(shard.given)
    for name, axes in shard.axes.items():
        tokens = axes.tokens
        if name in given and tokens is not None and "q" in axes.at:
            # What keys read too stays where they are.
            shared = "k" in axes.at and not axes.of_pairs
            at = of_queries(name) if shared else name
            given[at] = _sent(shard, given[name], tokens.axis, balance)
    size = shard.shards.q_size // CHUNKS
    mine = jnp.asarray(balance.chunks, jnp.int32)[shard.index]
    each = jnp.arange(size, dtype=jnp.int32)
    positions = (mine[:, None] * size + each[None]).reshape(-1)
    inputs = _sent(shard, q, 1, balance), k, v
    return MovedQueries(
        replace(shard, inputs=inputs, given=given, queries=positions), balance
    )


def _sent(
    shard: Shard, x: Array, axis: int, balance: Balance, *, home: bool = False
) -> Array:
    """``x`` with the chunks that a shard works on; or back from there."""
    halves = jnp.split(x, CHUNKS, axis=axis)
    slots = []
    for to in range(CHUNKS):
        arrived = []
        for of in range(CHUNKS):
            pairs = _pairs(balance, of, to, home=home)
            if pairs:
                arrived.append(jax.lax.ppermute(halves[of], shard.axis, pairs))
        # A shard receives one of them; the others are 0 there.
        found = arrived[0]
        for other in arrived[1:]:
            found = found + other
        slots.append(found)
    return jnp.concatenate(slots, axis=axis)


def _pairs(balance: Balance, of: int, to: int, *, home: bool) -> list[tuple[int, int]]:
    """Who sends its half number ``of`` to whom, as half number ``to``."""
    found = []
    for shard, chunks in enumerate(balance.chunks):
        for slot, chunk in enumerate(chunks):
            owner, half = divmod(chunk, CHUNKS)
            if home and (slot, half) == (of, to):
                found.append((shard, owner))
            if not home and (half, slot) == (of, to):
                found.append((owner, shard))
    return found
