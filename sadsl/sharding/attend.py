"""``attend_shard``: a generic function with one rule for each kind of term."""

from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatch
from typing import Any

import jax.numpy as jnp

from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.run import dropout_seeds, merging, traced_offset
from sadsl.run.attend import attend
from sadsl.run.heads import slices
from sadsl.run.mixtures import combined
from sadsl.run.over import entries_of
from sadsl.run.softmax import sinks_of
from sadsl.run.types import Outcome
from sadsl.selections.base import selections_of
from sadsl.sharding.over_keys import over_keys, whole_arrays
from sadsl.sharding.shard import Shard
from sadsl.sharding.whole import whole
from sadsl.terms.base import Spec, read_by
from sadsl.terms.heads import Heads
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.mixtures import (
    Average,
    Gated,
    Joint,
    Weighted,
)
from sadsl.terms.moved import OFFSET, PairPlaces
from sadsl.terms.over import Over
from sadsl.terms.softmax import Softmax


@singledispatch
def attend_shard(term: Spec, shard: Shard) -> Outcome:
    """The outcome of the queries of a shard; a term without a rule runs whole."""
    return whole(term, shard)


@attend_shard.register
def _(term: IndexMap, shard: Shard) -> Outcome:
    return attend_shard(Softmax(term), shard)


@attend_shard.register
def _(term: Softmax, shard: Shard) -> Outcome:
    """A softmax over own and received keys; the sink counts once."""
    found = over_keys(replace(term, sink=None), shard)
    if term.sink is None:
        return found
    assert found.lse is not None
    sinks = sinks_of(term, shard.given, shard.inputs[0])
    return merging.with_sink(found.out, found.lse, sinks)


@attend_shard.register(Latent)
@attend_shard.register(LocalLinear)
def _(term: Latent | LocalLinear, shard: Shard) -> Outcome:
    return over_keys(term, shard)


@attend_shard.register
def _(term: Over, shard: Shard) -> Outcome:
    """All devices have the entries; only the queries are at other positions."""
    if selections_of(term.map):
        return whole(term, shard)
    places = PairPlaces(whole=whole_arrays(term, shard))
    placed = replace(term, map=traced_offset.moved_map(term.map, shard.given, places))
    count = entries_of(term, term.source, shard.given, shard.inputs[0]).shape[1]
    at = shard.query_positions, jnp.arange(count, dtype=jnp.int32)
    given = {**shard.given, **dropout_seeds.at_places(shard.given, *at)}
    given[OFFSET] = shard.first_query
    return attend(placed, shard.inputs, read_by(placed, given), shard.setting)


@attend_shard.register(Joint)
@attend_shard.register(Average)
@attend_shard.register(Gated)
@attend_shard.register(Weighted)
def _(term: Any, shard: Shard) -> Outcome:
    """The parts of the whole call, each over its own keys."""
    q, shards = shard.inputs[0], shard.shards
    problem = Problem(shards.q_seq_len, shards.kv_seq_len, q.shape[2])

    def of_part(part: Spec, given: Mapping[str, Any]) -> Outcome:
        return attend_shard(part, replace(shard, given=given))

    return combined(term, q, shard.given, problem, of_part)


@attend_shard.register
def _(term: Heads, shard: Shard) -> Outcome:
    """Each part on its own heads."""
    found = []
    for i, (inputs, part) in enumerate(slices(shard.inputs, term)):
        given = dropout_seeds.of_part(shard.given, i)
        own = replace(shard.with_inputs(*inputs), given=given)
        found.append(attend_shard(part, own))
    return merging.beside(found)
