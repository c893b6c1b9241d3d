"""``attend_shard``: a generic function with one rule for each kind of term."""

from dataclasses import replace
from functools import singledispatch

import jax.numpy as jnp
from jaxtyping import Array

from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.run import dropout_seeds, merging, traced_offset
from sadsl.run.attend import attend
from sadsl.run.heads import slices
from sadsl.run.mixtures import gates_of, weighed
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
    Mixture,
    Weighted,
    members_of,
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


@attend_shard.register
def _(term: Joint, shard: Shard) -> Outcome:
    """One softmax over all parts: those of the whole call, merged."""
    found = []
    for member in members_of(term, _problem(shard)):
        own = shard
        if member.draw:
            own = replace(shard, given=dropout_seeds.of_part(shard.given, member.draw))
        found.append(weighed(attend_shard(member.term, own), member.log_weight))
    return found[0] if len(found) == 1 else merging.merge(found)


@attend_shard.register
def _(term: Average, shard: Shard) -> Outcome:
    return Outcome(merging.mean(_outputs(term, shard)), None)


@attend_shard.register
def _(term: Gated, shard: Shard) -> Outcome:
    gates = gates_of(term, shard.given, shard.inputs[0])
    return Outcome(merging.gated_sum(_outputs(term, shard), gates), None)


@attend_shard.register
def _(term: Weighted, shard: Shard) -> Outcome:
    return weighed(attend_shard(term.term, shard), term.log_weight)


@attend_shard.register
def _(term: Heads, shard: Shard) -> Outcome:
    """Each part on its own heads."""
    found = []
    for i, (inputs, part) in enumerate(slices(shard.inputs, term)):
        given = dropout_seeds.of_part(shard.given, i)
        own = replace(shard.with_inputs(*inputs), given=given)
        found.append(attend_shard(part, own))
    lses = [x.lse for x in found if x.lse is not None]
    lse = jnp.concatenate(lses, axis=1) if len(lses) == len(found) else None
    return Outcome(jnp.concatenate([x.out for x in found], axis=2), lse)


def _outputs(term: Mixture, shard: Shard) -> tuple[Array, ...]:
    """The outputs of all parts; dropout draws anew for each part."""
    found = []
    for i, part in enumerate(term.terms):
        given = dropout_seeds.of_part(shard.given, i)
        found.append(attend_shard(part, replace(shard, given=given)).out)
    return tuple(found)


def _problem(shard: Shard) -> Problem:
    """The sizes of the whole call."""
    heads = shard.inputs[0].shape[2]
    return Problem(shard.shards.q_seq_len, shard.shards.kv_seq_len, heads)
