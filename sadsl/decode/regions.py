"""Decodes ``summaries``: a region is summarised when its last token is there."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lowering import ir, pipeline
from lowering.problem import Problem
from sadsl.decode.advance import NewTokens, advance
from sadsl.decode.states import CacheSizes, start
from sadsl.run import traced_offset
from sadsl.run.attend import attend
from sadsl.run.over import over_entries
from sadsl.run.summaries import RowTokens, feature, for_heads, keys_and_values
from sadsl.run.types import QKV, Outcome
from sadsl.selections.static_cells import of_heads, pairs_at
from sadsl.terms.base import read_by
from sadsl.terms.cluster_regions import Clusters
from sadsl.terms.grid_regions import Rowmajor
from sadsl.terms.moved import OFFSET, Moved, PairPlaces
from sadsl.terms.regions import Partition
from sadsl.terms.summaries import Summaries

# The numbers of regions in a call; no identifier, so no caller's name.
REGION = "region.number"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RegionStore:
    """The tokens so far, and the regions that are whole.

    Attributes:
      tokens: q, k and v of all tokens, ``[batch, max_len, heads, dim]``.
      entries: keys and values of all regions, ``[batch, regions, num_heads, dim]``.
    """

    tokens: tuple[Array, Array, Array]
    entries: tuple[Array, Array]


class Due(NamedTuple):
    """Regions in the order of their last tokens; empty ones are left out."""

    region: np.ndarray
    last: np.ndarray

    def most(self, size: int) -> int:
        """The most regions that end within ``size`` tokens."""
        begin = np.searchsorted(self.last, self.last)
        end = np.searchsorted(self.last, self.last + size)
        return int((end - begin).max(initial=0))


@lru_cache(maxsize=64)
def due_of(partition: Partition, n: int) -> Due:
    """When each region of ``n`` tokens ends."""
    problem = Problem(partition.num_regions(n), n)
    stages = pipeline.run(partition.members(n).node, problem)
    mask = pipeline.block_mask(stages, 1, 1, "q", True)
    ptr, stop = np.asarray(mask.row_ptr), np.asarray(mask.run_stop)
    some = np.flatnonzero(np.diff(ptr))
    last = np.array([stop[ptr[r] : ptr[r + 1]].max() - 1 for r in some], np.int32)
    order = np.argsort(last, kind="stable")
    return Due(some[order].astype(np.int32), last[order])


@start.register
def _(term: Summaries, sizes: CacheSizes) -> RegionStore:
    """All tokens, since regions pool and ask with their queries.

    Raises:
      NotImplementedError: content decides the regions, or some tokens do not exist.
      ValueError: a query reads later tokens.
    """
    if isinstance(term.partition, Clusters) or term.valid is not None:
        raise NotImplementedError(
            f"decoding {term!r}: regions must follow from positions alone; call "
            "attention on the whole sequence"
        )
    n = sizes.max_len
    term.partition.check(n)
    heads, keys = sizes.num_heads, sizes.num_kv_heads
    shapes = (
        (n, heads, sizes.head_dim),
        (n, keys, sizes.head_dim),
        (n, sizes.num_v_heads, sizes.head_dim_v),
    )
    q, k, v = (jnp.zeros((sizes.batch, *shape), sizes.dtype) for shape in shapes)
    regions = term.partition.num_regions(n)
    entries = (
        jnp.zeros((sizes.batch, regions, heads, dim), sizes.dtype)
        for dim in (sizes.head_dim, sizes.head_dim_v)
    )
    keys_of, values_of = entries
    return RegionStore((q, k, v), (keys_of, values_of))


@advance.register
def _(
    term: Summaries, state: RegionStore, new: NewTokens
) -> tuple[Outcome, RegionStore]:
    """Attention to the regions that ended before or within the new tokens.

    Raises:
      NotImplementedError: sequences have lengths of their own.
    """
    if new.count.ndim:
        raise NotImplementedError(
            f"decoding {term!r} with ragged=True: regions end at one position for all "
            "sequences: decode them one by one"
        )
    n, size = new.max_len, new.inputs[0].shape[1]
    q, k, v = (
        jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), new.count, 1)
        for old, x in zip(state.tokens, new.inputs, strict=True)
    )
    due = due_of(term.partition, n)
    most = due.most(size)
    ended = jnp.searchsorted(jnp.asarray(due.last), new.count).astype(jnp.int32)
    spare = np.full(most, n, np.int32)
    region, last = (
        jax.lax.dynamic_slice_in_dim(jnp.asarray(np.append(x, spare)), ended, most)
        for x in due
    )
    live = last < new.count + size
    region = jnp.where(live, region, 0)
    at = jnp.where(live, region, state.entries[0].shape[1])

    def with_new() -> tuple[Array, Array]:
        made = _made(term, (q, k, v), region, new)
        keys, values = (
            old.at[:, at].set(x.astype(old.dtype), mode="drop")
            for old, x in zip(state.entries, made, strict=True)
        )
        return keys, values

    entries = jax.lax.cond(live.any(), with_new, lambda: state.entries)
    seen = traced_offset.moved_map(term.partition.seen(n), {})
    inputs = new.inputs[0], *entries
    found = over_entries(seen, inputs, read_by(seen, {OFFSET: new.count}), new.setting)
    return found, RegionStore((q, k, v), entries)


def _made(
    term: Summaries, tokens: QKV, region: Int[Array, " regions"], new: NewTokens
) -> tuple[Array, Array]:
    """The keys and values of some regions, ``[batch, regions, num_heads, dim]``."""
    q, k, v = tokens
    n = new.max_len
    members = term.partition.members(n)
    places = PairPlaces(q=ir.Operand(REGION, (ir.Q,)), length=n)
    of_regions = Moved(members, places)

    def within(asked: Array, values: Array) -> Array:
        inputs = asked, k, values
        return attend(of_regions, inputs, {REGION: region}, new.setting).out

    if isinstance(term.partition, Rowmajor):
        # The region of a token asks with its query.
        asked, own = (jnp.take(x, region, axis=1) for x in (q, k))
        rows = RowTokens(asked, own, k, v)
        keys, values = keys_and_values(rows, term.partition, new.given, within)
        return for_heads(keys, q), values
    (node,) = of_heads(members, Problem(term.partition.num_regions(n), n))
    held = pairs_at(
        (node,), region[:, None], jnp.arange(n, dtype=jnp.int32)[None],
        Problem(term.partition.num_regions(n), n),
    )[0]  # fmt: skip
    asked, keys = (
        _pooled(feature(name, x, new.given), held, term.pool)
        for name, x in zip(term.features, (q, k), strict=True)
    )
    return for_heads(keys, q), within(asked, v)


def _pooled(x: Array, held: Bool[Array, "regions n"], pool: str) -> Array:
    """The pool of the tokens of each region, in the dtype of ``x``."""
    wide = x.astype(jnp.float32)

    def of(inside: Bool[Array, " n"]) -> Array:
        mask = inside[None, :, None, None]
        if pool == "max":
            return jnp.where(mask, wide, -jnp.inf).max(axis=1)
        total = jnp.where(mask, wide, 0.0).sum(axis=1)
        count = inside.sum(dtype=jnp.float32)
        return total / jnp.maximum(count, 1.0) if pool == "mean" else total

    return jnp.moveaxis(jax.lax.map(of, held), 0, 1).astype(x.dtype)
