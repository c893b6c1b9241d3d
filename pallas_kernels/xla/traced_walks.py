"""Traced plans: a loop over who has a walk of their own, batch entries or heads.

One program for all of them, whatever the content: the walks are rows of one table, and
a loop picks one with the arrays that it is for. Batch entries or heads that share a
walk stay together, in one step of the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.call import Inputs, PairBits, Vectors
from pallas_kernels.precision import widened
from pallas_kernels.xla.heads import HeadGroup
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan


@dataclass(frozen=True)
class Owner:
    """The arrays of those who share a walk; ``None``: all batch entries, or heads."""

    inputs: Inputs
    vectors: Vectors
    group: HeadGroup
    walk: Any
    batch: Any
    head: Any

    def plan(self, plan: XlaPlan) -> XlaPlan:
        """The plan with the one walk of this owner."""
        (walks,) = plan.walks
        own = jax.tree.map(lambda x: x[self.walk], walks)
        return replace(plan, walks=(own,))

    def of_queries(self, arrays: Any) -> Any:
        """The part of ``[batch, q_heads, ...]`` arrays that is theirs."""
        return jax.tree.map(lambda x: _at(_at(x, self.batch, 0), self.head, 1), arrays)


def is_traced(lists: XlaLists) -> bool:
    """Whether the walks are a table with an axis of maps."""
    walk = lists.forward.walks[0]
    return walk.long is not None and np.ndim(walk.long.row) == 2


def for_owners(
    run: Callable[[Owner], Any], inputs: Inputs, vectors: Vectors, lists: XlaLists
) -> Any:
    """``run`` for every owner; its arrays are ``[batch, heads, ...]``, put together.

    Where heads have walks of their own, so do all arrays: ``dk`` and ``dv`` come one
    for each query head (see ``add_group``).
    """
    batch, num_heads = inputs.q.shape[:2]
    maps = np.array(lists.map_of_head).reshape(-1, num_heads)
    by_head = bool((maps != maps[:, :1]).any())
    by_batch = len(maps) > 1
    maps = maps if by_head else maps[:, :1]
    tests = np.array(lists.test_of_map)[maps]
    group = num_heads // inputs.k.shape[1]

    def of(index: tuple) -> Any:
        walk, test, b, h = index
        b, h = b if by_batch else None, h if by_head else None
        kv_head = None if h is None else h // group
        q, k, v = (_at(x, b, 0) for x in inputs)
        own = Inputs(_at(q, h, 1), _at(k, kv_head, 1), _at(v, kv_head, 1))
        heads = tuple(range(own.q.shape[1])), tuple(range(own.k.shape[1]))
        at = HeadGroup(0, *heads, test)
        return run(Owner(own, _vectors(vectors, b, h), at, walk, b, h))

    b, h = np.meshgrid(np.arange(len(maps)), np.arange(maps.shape[1]), indexing="ij")
    index = tuple(jnp.asarray(x.reshape(-1), jnp.int32) for x in (maps, tests, b, h))
    if maps.size == 1:
        return of(tuple(x[0] for x in index))
    found = jax.lax.map(of, index)

    def joined(x: jax.Array) -> jax.Array:
        # [owners, batch or 1, heads or 1, ...]
        x = x.reshape(*maps.shape, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 2)
        return x.reshape(batch, -1, *x.shape[4:])

    return jax.tree.map(joined, found)


def add_group(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """The sum over the query heads that read a key head, where they come apart."""
    if x.shape[1] == num_kv_heads:
        return x
    x = x.reshape(x.shape[0], num_kv_heads, -1, *x.shape[2:])
    return widened(x).sum(axis=2)


def _at(x: jax.Array, index: Any, axis: int) -> jax.Array:
    if index is None:
        return x
    return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=True)


def _vectors(vectors: Vectors, b: Any, h: Any) -> Vectors:
    def own(x: jax.Array) -> jax.Array:
        x = _at(x, b, 0) if x.shape[0] > 1 else x
        return _at(x, h, 1) if x.shape[1] > 1 else x

    def own_bits(x: PairBits) -> PairBits:
        return replace(x, words=own(x.words))

    # The bit numbers of the keys have no axes of batch and heads.
    bits = tuple(own_bits(x) for x in vectors.bits)
    rest = jax.tree.map(own, vectors._replace(bits=()))
    return rest._replace(bits=bits)
