"""One row of blocks of local linear attention: its weights, keys and linear systems."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import softmax, solve
from pallas_kernels.call import Call, Inputs, Vectors
from pallas_kernels.loops import repeat
from pallas_kernels.solve import Accuracy
from pallas_kernels.varying import vary
from pallas_kernels.xla import tile
from pallas_kernels.xla.heads import HeadGroup, add_up, head_groups, join, pick
from pallas_kernels.xla.rows import Blocks, Fold
from pallas_kernels.xla.traced_walks import Owner, add_group, for_owners, is_traced
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan


class KeyTile(NamedTuple):
    """Some blocks of a row: their weights, and their keys relative to the centre."""

    p: Float[Array, "b h gq k"]
    k: Float[Array, "b h k d"]
    block: Int32[Array, " slots"]
    seen: Bool[Array, "..."] | None


@dataclass(frozen=True)
class FitRow:
    """A row of queries, ``[batch, kv_heads, group * q, ...]``, with its systems.

    ``at`` and ``mean`` are relative to ``centre``, the mean of the row's means. That
    changes no result; it keeps the rounding of large common offsets out of ``C``.
    """

    q: Float[Array, "b h gq d"]
    at: Float[Array, "b h gq d"]
    mean: Float[Array, "b h gq d"]
    ridge: Float[Array, "b h gq 1"]
    some: Bool[Array, "b h gq 1"]  # whether a query sees a key
    centre: Float[Array, "b h 1 d"]
    fold: Fold  # over the tiles of the row, each a KeyTile

    def along(self, tile: KeyTile, x: Array) -> Float[Array, "b h gq k"]:
        """``(k_j - mean) . x`` for the keys of a tile."""
        shift = jnp.sum(self.mean * x, axis=-1, keepdims=True)
        return dot(x, tile.k, (1, 1)) - shift

    def solved(self, b: Array, accuracy: Accuracy) -> tuple[Array, Array]:
        """The ``x`` with ``(C + ridge I) x = b``, and its residual ``[b, h, gq, 1]``.

        ``x`` is NaN where the residual misses the tolerance.
        """
        size = b.shape[-1]
        if accuracy.forms_at_once(size):
            return self.factored(b, accuracy)
        x = solve.by_iterations(self.product, b, accuracy)
        found = solve.checked(x, b - self.product(x), b, accuracy)
        if not accuracy.forms_later(size):
            return found
        met = jnp.all(found[1] <= accuracy.tolerance)
        return jax.lax.cond(met, lambda: found, lambda: self.factored(b, accuracy))

    def factored(self, b: Array, accuracy: Accuracy) -> tuple[Array, Array]:
        """``solved`` by forming ``C``, and factoring the systems of one head a time."""
        row, column, place = solve.corner(b.shape[-1])
        one = jnp.eye(b.shape[-1], dtype=b.dtype)[None]

        def of_head(args: tuple[Array, ...]) -> tuple[Array, Array]:
            moments, mean, ridge, b = args
            c = moments - mean[:, row] * mean[:, column]
            a = c[:, place] + ridge[..., None] * one
            x = solve.by_factors(a, b)
            return x, b - jnp.einsum("qde,qe->qd", a, x, precision="highest")

        args = self.moments(), self.mean, self.ridge, b
        args = tuple(x.reshape(-1, *x.shape[2:]) for x in args)
        x, left = (y.reshape(b.shape) for y in jax.lax.map(of_head, args))
        return solve.checked(x, left, b, accuracy)

    def product(self, x: Array) -> Float[Array, "b h gq d"]:
        """``(C + ridge I) x``, without forming ``C``."""

        def add(sums: tuple[Array, Array], tile: KeyTile) -> tuple[Array, Array]:
            weights = tile.p * self.along(tile, x)
            total = sums[0] + dot(weights, tile.k, (1, 0))
            return total, sums[1] + weights.sum(axis=-1, keepdims=True)

        # The weights add up to 0 but for rounding. Where one key has most of the
        # weight, its rounding would count times the key, not times ``key - mean``.
        start = self.ridge * x, jnp.zeros_like(self.ridge)
        total, rest = self.fold(add, vary(start, x))
        return total - self.mean * rest

    def moments(self) -> Float[Array, "b h gq corner"]:
        """``sum p_j k_j k_j^T`` for relative keys: its upper triangle, row by row."""
        row, column, _ = solve.corner(self.mean.shape[-1])

        def add(total: Array, tile: KeyTile) -> Array:
            size = tile.k.shape[2] // len(tile.block)

            def one(i: Array, total: Array) -> Array:
                # A block at a time, since its products take d / 2 times its memory.
                p = jax.lax.dynamic_slice_in_dim(tile.p, i * size, size, 3)
                k = jax.lax.dynamic_slice_in_dim(tile.k, i * size, size, 2)
                return total + dot(p, k[..., row] * k[..., column], (1, 0))

            return repeat(len(tile.block), one, total)

        start = jnp.zeros((*self.mean.shape[:-1], len(row)), self.mean.dtype)
        return self.fold(add, vary(start, self.mean))


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """``tile.batched_dot`` with its contracted axes by position."""
    return tile.batched_dot(a, b, contract=contract)


class OfQueries(NamedTuple):
    """The arrays of all queries that a row is made of.

    ``[batch, q_heads, q, ...]``, or those of a head group in blocks.
    """

    at: Any
    mean: Any
    lse: Any
    total: Any
    ridge: Any


@dataclass(frozen=True)
class GroupArrays:
    """The arrays of one head group in blocks, of which rows are made."""

    blocks: tile.Operands
    queries: OfQueries
    heads: HeadGroup
    call: Call

    def row(self, at: Array, blocks: Blocks) -> FitRow:
        """The row with index ``at``, whose blocks of keys are ``blocks``."""
        lse, total, ridge = (tile.row_of(x, at)[..., None] for x in self.queries[2:])
        some = ~jnp.isneginf(lse)
        # A query that sees no key may hold NaN. Its system gets the solution 0.
        q, point, mean = (
            jnp.where(some, self.vectors_of(x, at), 0.0)
            for x in (self.blocks.q, *self.queries[:2])
        )
        count = jnp.maximum(some.sum(axis=2, keepdims=True), 1).astype(mean.dtype)
        centre = mean.sum(axis=2, keepdims=True) / count
        point, mean = (jnp.where(some, x - centre, 0.0) for x in (point, mean))
        group = q.shape[2] // self.blocks.q.shape[2]
        lse = softmax.lse_for_backward(lse, self.call.unit)

        def make(block: Array, shown: tile.Shown) -> KeyTile:
            k = tile.gather(self.blocks.k, block, shown.seen)
            s = tile.scores(q * self.call.scale, k, group, self.call)
            s = tile.masked(s, shown).reshape(*q.shape[:-1], s.shape[-1])
            p = softmax.power(s - lse, self.call.unit) / total
            return KeyTile(p, k - centre, block, shown.seen)

        return FitRow(q, point, mean, ridge, some, centre, blocks(make))

    def vectors_of(self, x: Array, at: Array) -> Float[Array, "b h gq d"]:
        """The row ``at`` of an array ``[batch, blocks, q, heads, d]``."""
        return tile.queries_of(x, at, len(self.heads.kv_heads))

    def values(self, at: KeyTile) -> Float[Array, "b h k dv"]:
        """The values of the keys of a tile."""
        return tile.gather(self.blocks.v, at.block, at.seen)


def group_arrays(
    inputs: Inputs, queries: OfQueries, plan: XlaPlan, heads: HeadGroup, call: Call
) -> GroupArrays:
    """The arrays of a head group, in blocks."""
    # Padded queries see no key, and their systems need a positive ridge all the same.
    fills = -jnp.inf, 1.0, 1.0
    of_queries = OfQueries(
        *(vectors(x, heads, plan) for x in queries[:2]),
        *(
            numbers(x, heads, plan, fill)
            for x, fill in zip(queries[2:], fills, strict=True)
        ),
    )
    return GroupArrays(tile.operands(inputs, heads, plan), of_queries, heads, call)


def vectors(x: Array, heads: HeadGroup, plan: XlaPlan) -> Array:
    """``[batch, q_heads, q, d]`` of some heads as ``[batch, blocks, q, heads, d]``."""
    return tile.positions_first(pick(x, heads.q_heads), plan.block_q)


def numbers(x: Array, heads: HeadGroup, plan: XlaPlan, fill: float = 0.0) -> Array:
    """``[batch, q_heads, q]`` as ``[batch, kv_heads, group, blocks, q]``."""
    return tile.to_blocks(tile.fold_heads(x, heads), 3, plan.block_q, fill)


def over_heads(
    run: Callable[..., tuple[Any, Any]], inputs: Inputs, queries: Any, vectors: Vectors,
    lists: XlaLists, plan: XlaPlan,
) -> tuple[Any, Any]:  # fmt: skip
    """Joins what ``run`` yields for each group of heads, or for each traced plan.

    ``run(inputs, queries, vectors, plan, heads)`` returns arrays of the queries of
    these heads, and arrays of their keys, which are summed.
    """
    kv_heads = inputs.k.shape[1]
    if is_traced(lists):

        def of_owner(own: Owner) -> tuple[Any, Any]:
            mine = own.of_queries(queries)
            return run(own.inputs, mine, own.vectors, own.plan(plan), own.heads)

        found, of_keys = for_owners(of_owner, inputs, vectors, lists)
        return found, jax.tree.map(lambda x: add_group(x, kv_heads), of_keys)
    groups = head_groups(lists.map_of_head, lists.test_of_map, kv_heads)
    parts = [run(inputs, queries, vectors, plan, heads) for heads in groups]
    every, of_keys = zip(*parts, strict=True)
    of_q, of_kv = [x.q_heads for x in groups], [x.kv_heads for x in groups]
    return (
        jax.tree.map(lambda *x: join(list(x), of_q), *every),
        jax.tree.map(lambda *x: add_up(list(x), of_kv, kv_heads), *of_keys),
    )
