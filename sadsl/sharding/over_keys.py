"""Attends over the keys that a map needs of all shards."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lowering import ir, pipeline
from lowering.expr.places import WholeArrays
from lowering.partition.exchange import Exchange, exchange
from lowering.partition.shards import Shards
from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.run import dropout_seeds, merging, traced_offset
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome
from sadsl.selections.base import selections_of
from sadsl.sharding import wire
from sadsl.sharding.shard import Shard
from sadsl.terms.base import Spec, read_by
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.moved import OFFSET, PairPlaces, of_queries
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

# The names of keys, values and positions among the rows of a shard. They are no
# identifiers, so no caller's names.
K, V = "shard.k", "shard.v"
SLOT, FIRST_KEY = "shard.position", "shard.first_key"
AT_SLOT = ir.Operand(SLOT, (ir.K,))
AT_SLOTS = PairPlaces(k=AT_SLOT, held=ir.Le(ir.Const(0), AT_SLOT))


def by_query(term: Spec, shard: Shard) -> bool:
    """Whether the choices of a term are made for each query alone."""
    chosen = selections_of(map_of(term))
    given = any(choice.owns(name) for choice in chosen for name in shard.given)
    return not given and all(choice.by_position for choice in chosen)


def whole_arrays(term: Spec, shard: Shard) -> WholeArrays:
    """The arrays that hold all positions, along the axes of queries or of keys."""
    given = {name: shard.axes[name] for name in shard.of(term) if name in shard.axes}
    whole = frozenset(name for name, axes in given.items() if axes.tokens is None)
    pairs = frozenset(name for name, axes in given.items() if axes.of_pairs)
    return WholeArrays(whole, whole | pairs)


def map_of(term: Any) -> IndexMap:
    """The one map of a term."""
    return term.softmax.map if isinstance(term, Latent) else term.map


def exchange_of(term: Spec, shards: Shards, num_heads: int) -> Exchange:
    """How the keys travel that a term with one map needs."""
    pairs = map_of(term)
    if selections_of(pairs):
        # Any key may be chosen.
        return Exchange(shards, everything=shards.count > 1)
    problem = Problem(shards.q_seq_len, shards.kv_seq_len, num_heads)
    return exchange(pipeline.run(pairs.node, problem)["simplify"].maps, shards)


def over_keys(term: Any, shard: Shard) -> Outcome:
    """A term over the keys that its map needs of all shards."""
    q, k, v = shard.inputs
    found = exchange_of(term, shard.shards, q.shape[2])
    of_keys = isinstance(term, Latent) or (
        isinstance(term, Softmax) and term.values is not None
    )
    rows = {K: k} if of_keys else {K: k, V: v}
    axes = dict.fromkeys(rows, 1)
    for name, tokens in shard.by_token(term).items():
        if "k" in shard.axes[name].at and not shard.axes[name].of_pairs:
            rows[name], axes[name] = shard.given[name], tokens.axis
    if found.everything:
        return _attend(term, shard, wire.every(shard, rows, axes), PairPlaces())
    near = wire.span(shard, rows, axes, found)
    far = wire.others(shard, rows, axes, found)
    if far is not None and isinstance(term, LocalLinear):
        # Its outcomes cannot be merged.
        return _attend(term, shard, wire.joined([near, far], axes), AT_SLOTS)
    outcome = _attend(term, shard, near, _span_places(shard, found))
    if far is None:
        return outcome
    return merging.merge([outcome, _attend(term, shard, far, AT_SLOTS)])


def _span_places(shard: Shard, found: Exchange) -> PairPlaces:
    """The positions of keys side by side, which begin with those of the halo."""
    shards = shard.shards
    own = ir.Operand(OFFSET if shards.aligned else FIRST_KEY, ())
    first = ir.Add(own, ir.Const(-found.before * shards.granule))
    at = ir.Add(ir.K, first)
    held: list[ir.Pred] = [ir.Le(ir.Const(0), at)] if found.before else []
    if found.after or shards.count * shards.kv_size > shards.kv_seq_len:
        held.append(ir.Le(at, ir.Const(shards.kv_seq_len - 1)))
    return PairPlaces(k=at, held=ir.And(tuple(held)) if held else None)


def _attend(
    term: Spec, shard: Shard, keys: wire.ShardKeys, places: PairPlaces
) -> Outcome:
    """The term over keys at the given places."""
    rows = keys.rows
    both = frozenset(
        name for name in rows if name in shard.axes and "q" in shard.axes[name].at
    )
    places = replace(
        places,
        length=shard.shards.kv_seq_len,
        queries=both,
        whole=whole_arrays(term, shard),
    )
    placed = traced_offset.moved(any_term(term), shard.given, places)
    given: dict[str, Any] = {**shard.given}
    given |= {of_queries(name): shard.given[name] for name in both}
    given |= {n: x for n, x in rows.items() if n not in (K, V)}
    given |= {OFFSET: shard.first_query, FIRST_KEY: shard.first_key}
    given[SLOT] = keys.position
    q_at = shard.first_query + jnp.arange(shard.shards.q_size, dtype=jnp.int32)
    given |= dropout_seeds.at_places(shard.given, q_at, keys.position)
    k = rows[K]
    inputs: QKV = shard.inputs[0], k, rows.get(V, k)
    config = replace(shard.setting.config, relayout=False)
    setting = replace(shard.setting, config=config)
    return attend(placed, inputs, read_by(placed, given), setting)
