"""Runs ``summaries``: makes an entry of each region, and attends as ``over`` does."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sadsl.maps.base import IndexMap
from sadsl.maps.named import where
from sadsl.maps.symbols import OperandArray
from sadsl.run import pools
from sadsl.run.attend import attend
from sadsl.run.content import chosen_parts
from sadsl.run.operands import call_arrays
from sadsl.run.options import options_of
from sadsl.run.over import over_entries
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms import cluster_regions
from sadsl.terms.base import is_dropout
from sadsl.terms.cluster_regions import Clusters
from sadsl.terms.grid_regions import Rowmajor
from sadsl.terms.softmax import Softmax
from sadsl.terms.summaries import PLAIN, Summaries

# Names of run-time arrays that no operand of a caller can have.
VALID, SOME = "regions.valid", "regions.some"
INHABITED = where(lambda q, k: OperandArray(SOME)[k] != 0)


@attend.register
def _(
    term: Summaries, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Regions are entries, made of the tokens: output and lse over those a query reads.

    The regions attend to their members, which yields the values of the entries. Then
    they run as ``over`` does. Gradients flow through both and through pools.

    Raises:
      ValueError: the sizes do not fit the partition, or operands are missing.
      NotImplementedError: queries and keys do not belong to the same tokens.
    """
    q, k, _ = inputs
    n = k.shape[1]
    if q.shape[1] != n or setting.q_offset:
        raise NotImplementedError(
            f"{term!r} with {q.shape[1]} queries at offset {setting.q_offset} and {n} "
            "keys: regions pool the queries of their tokens, so queries and keys must "
            "belong to the same tokens; pass all queries, with q_offset=0"
        )
    term.partition.check(n)
    of = _clusters if isinstance(term.partition, Clusters) else _regions
    found = of(term, inputs, given, setting)
    keys = for_heads(found.keys, q)
    read = {**found.operands, **_dropped_by(given)}
    return over_entries(found.seen, (q, keys, found.values), read, setting)


class Entries(NamedTuple):
    """The regions of a call as entries, and which of them a query sees."""

    keys: Array  # [batch, regions, heads, dim]
    values: Array  # [batch, regions, num_q_heads, dim_v]
    seen: IndexMap
    operands: Mapping[str, Array]  # those of ``seen``


def _regions(
    term: Summaries, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Entries:
    """The entries of a partition that is known without content."""
    return regions_of(term, inputs, given, setting, _valid(term, given, inputs))


def regions_of(
    term: Summaries, inputs: QKV, given: Mapping[str, Any], setting: Setting,
    valid: Array | None,
) -> Entries:  # fmt: skip
    """The entries of a partition that is known without content.

    ``valid``, bool ``[batch or 1, n]``, says which tokens there are; None: all.
    """
    _, k, v = inputs
    members, seen = (
        of(k.shape[1]) for of in (term.partition.members, term.partition.seen)
    )
    of_members: dict[str, Array] = {}
    of_seen: dict[str, Array] = {}
    if valid is not None:
        members &= where(lambda q, k: OperandArray(VALID)[k] != 0)
        seen &= INHABITED
        of_members[VALID] = valid
        of_seen[SOME] = pools.counted(valid, partition=term.partition) > 0
    once = replace(setting, dropout_rate=0.0)

    def within(asked: Array, values: Array) -> Array:
        return attend(members, (asked, k, values), of_members, once).out

    if isinstance(term.partition, Rowmajor):
        q, k, v = inputs
        keys, values = keys_and_values(
            RowTokens(q, k, k, v), term.partition, given, within
        )
        return Entries(keys, values, seen, of_seen)
    asked, keys = (
        pools.pooled(x, valid, partition=term.partition, pool=term.pool)
        for x in _features(inputs, term, given)
    )
    return Entries(keys, within(asked, v), seen, of_seen)


def _clusters(
    term: Summaries, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Entries:
    """The entries of clusters, whose members content decides for each head."""
    partition = term.partition
    assert isinstance(partition, Clusters)
    q, k, v = inputs
    mine, other = labels(q, k, partition, given, setting)
    valid = _valid(term, given, inputs)
    if valid is not None:
        other = jnp.where(valid[:, None, :], other, -2)
    order = cluster_regions.order_of(other)
    queries, keys = (
        cluster_regions.pooled(
            for_heads(x, q), other, order, partition=partition, pool=term.pool
        )
        for x in _features(inputs, term, given)
    )
    n, once = k.shape[1], replace(setting, dropout_rate=0.0)
    of_members = cluster_regions.operands_of_members(partition, other)
    values = attend(partition.members(n), (queries, k, v), of_members, once).out
    at = cluster_regions.tokens_read(other, partition=partition)
    of_seen = cluster_regions.operands_of_seen(partition, (mine, other), order, at)
    if partition.causal:
        keys, values = (cluster_regions.taken(x, at) for x in (keys, values))
    return Entries(keys, values, partition.seen(n), of_seen)


def labels(
    q: Array, k: Array, partition: Clusters, given: Mapping[str, Any], setting: Setting
) -> tuple[Array, Array]:
    """The cluster of each query and of each key, int32 ``[batch, heads, n]``.

    A negative label means no cluster.
    """
    kmeans = partition.kmeans
    alone = replace(setting, impl="reference", dropout_rate=0.0)
    options = options_of((q, k), Softmax(kmeans), alone)
    read = {n: x for n, x in given.items() if n in kmeans.operands or kmeans.owns(n)}
    arrays = call_arrays(options, read, q.shape[0])
    found = chosen_parts(q, k, arrays, options)
    shape = (q.shape[0], q.shape[2], k.shape[1])
    mine, other = (
        jnp.broadcast_to(found[kmeans.key(name)], shape)
        for name in ("q_label", "k_label")
    )
    return mine, other


class RowTokens(NamedTuple):
    """The tokens whose queries regions ask with, and those that they attend to."""

    q: Array
    own: Array  # the keys of the asking tokens
    k: Array
    v: Array


def keys_and_values(
    tokens: RowTokens,
    partition: Rowmajor,
    given: Mapping[str, Any],
    within: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """The keys and values of regions that attend with the query of a token."""
    q, own, k, v = tokens
    if partition.key == "none":
        return own, within(q, v)
    if partition.key == "proj":
        values = within(q, v)
        return _called(partition.proj, given, values, q.shape), values
    both = within(q, jnp.concatenate([k, v], axis=-1))
    keys, values = both[..., : k.shape[-1]], both[..., k.shape[-1] :]
    if partition.key == "wsum_proj":
        keys = _called(partition.proj, given, keys, q.shape)
    return keys, values


def _features(
    inputs: QKV, term: Summaries, given: Mapping[str, Any]
) -> tuple[Array, Array]:
    """The features of queries and of keys, which are pooled."""
    found = [
        feature(name, x, given)
        for name, x in zip(term.features, inputs[:2], strict=True)
    ]
    return found[0], found[1]


def feature(name: str, x: Array, given: Mapping[str, Any]) -> Array:
    """The feature map ``name`` of ``x``, which regions pool."""
    if name not in PLAIN:
        return _called(name, given, x, x.shape)
    return jax.nn.relu(x) if name == "relu" else x


def _called(
    name: str, given: Mapping[str, Any], x: Array, shape: tuple[int, ...]
) -> Array:
    """Applies the callable operand ``name`` to ``x``; the result has its dtype.

    Raises:
      ValueError: it was not given, or returns another shape.
      TypeError: it is not a function.
    """
    if name not in given:
        raise ValueError(
            f"summaries read {name!r}, a function of arrays [batch, seq, heads, dim], "
            f"which was not given: pass operands={{{name!r}: function}}"
        )
    function = given[name]
    if not callable(function):
        raise TypeError(
            f"operand {name!r} must be a function of arrays [batch, seq, heads, dim], "
            f"not a value of type {type(function).__name__}"
        )
    found = function(x)
    if found.shape != shape:
        raise ValueError(
            f"operand {name!r} returned shape {found.shape} for shape {x.shape}: it "
            f"must be {shape}: batch, seq and heads unchanged, and head_dim features"
        )
    return found.astype(x.dtype)


def _valid(term: Summaries, given: Mapping[str, Any], inputs: QKV) -> Array | None:
    """Which keys exist, bool ``[batch or 1, n]``; None if all exist.

    Raises:
      ValueError: the operand was not given, or has another shape.
    """
    if term.valid is None:
        return None
    batch, n = inputs[1].shape[:2]
    found = given.get(term.valid)
    if found is None or jnp.shape(found) not in ((n,), (1, n), (batch, n)):
        shape = None if found is None else jnp.shape(found)
        raise ValueError(
            f"{term!r} reads {term.valid!r}, which has shape {shape}: pass operands="
            f"{{{term.valid!r}: array}} of shape {(n,)} or {(batch, n)}, 0 at keys "
            "that do not exist"
        )
    return jnp.asarray(found).astype(bool).reshape(-1, n)


def for_heads(x: Array, q: Array) -> Array:
    """``x`` with one head for each query head: key heads are repeated."""
    group = q.shape[2] // x.shape[2]
    return x if group == 1 else jnp.repeat(x, group, axis=2)


def _dropped_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """The dropout key, for the weights of the regions; empty without dropout."""
    return {n: x for n, x in given.items() if is_dropout(n)}
