"""Attends over the keys that a map needs of all shards."""

from dataclasses import replace
from typing import Any, assert_never

from lowering import ir
from lowering.expr.places import WholeArrays
from lowering.partition.exchange import Exchange
from lowering.partition.shards import Shards
from sadsl.run import dropout_seeds, merging, traced_offset
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome
from sadsl.selections.base import selections_of
from sadsl.sharding import balanced, ring, wire
from sadsl.sharding.by_heads import by_heads
from sadsl.sharding.routes import (
    Route,
    ShardSizes,
    Way,
    map_of,
    route,
    values_are_keys,
)
from sadsl.sharding.shard import Shard
from sadsl.sharding.whole import whole
from sadsl.terms.base import Spec, read_by
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.moved import OFFSET, PairPlaces, of_queries
from sadsl.text.specs import any_term

# The names of keys, values and positions among the rows of a shard. They are no
# identifiers, so no caller's names.
K, V = "shard.k", "shard.v"
SLOT, FIRST_KEY = "shard.position", "shard.first_key"
QUERY = "shard.query"
AT_QUERY = ir.Operand(QUERY, (ir.Q,))
AT_SLOT = ir.Operand(SLOT, (ir.K,))
AT_SLOTS = PairPlaces(k=AT_SLOT, held=ir.Le(ir.Const(0), AT_SLOT))


def whole_arrays(term: Spec, shard: Shard) -> WholeArrays:
    """The arrays that hold all positions, along the axes of queries or of keys."""
    given = {name: shard.axes[name] for name in shard.of(term) if name in shard.axes}
    whole = frozenset(name for name, axes in given.items() if axes.tokens is None)
    pairs = frozenset(name for name, axes in given.items() if axes.of_pairs)
    return WholeArrays(whole, whole | pairs)


def over_keys(term: Any, shard: Shard) -> Outcome:
    """A term with one map, over the keys that it needs of all shards."""
    found = route_of(term, shard)
    match found.way:
        case "parts":
            return _over_parts(term, shard, found.parts)
        case "gather" | "ring":
            if found.balance is None:
                return _over_all(term, shard, found.way)
            moved = balanced.moved(shard, found.balance)
            return moved.back(_over_all(term, moved.shard, found.way))
        case "heads":
            return by_heads(term, shard)
        case "whole":
            return whole(term, shard)
    assert_never(found.way)


def route_of(term: Any, shard: Shard) -> Route:
    """How the keys of a term travel."""
    q, k, v = shard.inputs
    heads = q.shape[2], k.shape[2]
    dims = k.shape[3], v.shape[3]
    sizes = ShardSizes(shard.shards, *heads, *dims, k.dtype.itemsize)
    known = [shard.axes[name] for name in shard.of(term) if name in shard.axes]
    given = any(c.owns(n) for c in selections_of(map_of(term)) for n in shard.given)
    by_head = any(axes.head_axis is not None for axes in known)
    return route(term, sizes, reads_heads=given or by_head)


def _rows(term: Any, shard: Shard) -> tuple[wire.Rows, wire.Axes]:
    """What travels of a key, and the axis of the keys in each array."""
    _, k, v = shard.inputs
    rows = {K: k} if values_are_keys(term) else {K: k, V: v}
    axes = dict.fromkeys(rows, 1)
    for name, tokens in shard.by_token(term).items():
        if "k" in shard.axes[name].at and not shard.axes[name].of_pairs:
            rows[name], axes[name] = shard.given[name], tokens.axis
    return rows, axes


def _over_parts(term: Any, shard: Shard, found: Exchange) -> Outcome:
    """A term over the keys of a halo, shared ones, and those that were sent."""
    rows, axes = _rows(term, shard)
    near = wire.span(shard, rows, axes, found)
    far = wire.others(shard, rows, axes, found)
    if far is not None and isinstance(term, LocalLinear):
        # Its outcomes cannot be merged.
        return _attend(term, shard, wire.joined([near, far], axes), AT_SLOTS)
    outcome = _attend(term, shard, near, span_places(shard.shards, found))
    if far is None:
        return outcome
    return merging.merge([outcome, _attend(term, shard, far, AT_SLOTS)])


def _over_all(term: Any, shard: Shard, way: Way) -> Outcome:
    """A term over the keys of all shards."""
    rows, axes = _rows(term, shard)
    if way == "gather":
        return _attend(term, shard, wire.every(shard, rows, axes), PairPlaces())

    def over(shard: Shard, keys: wire.ShardKeys) -> Outcome:
        return _attend(term, shard, keys, AT_SLOTS)

    return ring.around(shard, rows, over)


def span_places(shards: Shards, found: Exchange) -> PairPlaces:
    """The positions of keys side by side, which begin with those of the halo."""
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
    if shard.queries is not None:
        places = replace(places, q=AT_QUERY)
    placed = traced_offset.moved(any_term(term), shard.given, places)
    given: dict[str, Any] = {**shard.given}
    at_query = {of_queries(name): shard.given[name] for name in both}
    given = {**at_query, **given}
    given |= {n: x for n, x in rows.items() if n not in (K, V)}
    given |= {OFFSET: shard.first_query, FIRST_KEY: shard.first_key}
    given[SLOT] = keys.position
    given[QUERY] = shard.query_positions
    at = given[QUERY], keys.position
    given |= dropout_seeds.at_places(shard.given, *at)
    k = rows[K]
    inputs: QKV = shard.inputs[0], k, rows.get(V, k)
    config = replace(shard.setting.config, relayout=False)
    setting = replace(shard.setting, config=config)
    return attend(placed, inputs, read_by(placed, given), setting)
