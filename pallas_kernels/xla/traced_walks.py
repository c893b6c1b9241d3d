"""Loops over batch entries or heads that have their own traced plan.

The walks of all maps are the rows of one table. Each step of the loop picks one walk
and the arrays that use it (its owner), so the program does not depend on the content.
Batch entries or heads that share a walk are processed together in one step.
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
    """The arrays that use one walk: those of a batch entry, of a head, or of all."""

    inputs: Inputs
    vectors: Vectors
    heads: HeadGroup
    walk: Any  # index of the walk
    batch: Any  # index of the batch entry; None: all
    head: Any  # index of the query head; None: all

    def plan(self, plan: XlaPlan) -> XlaPlan:
        """The plan with the one walk of this owner."""
        (walks,) = plan.walks
        own = jax.tree.map(lambda x: x[self.walk], walks)
        return replace(plan, walks=(own,))

    def of_queries(self, arrays: Any) -> Any:
        """The part of ``[batch, q_heads, ...]`` arrays that belongs to this owner."""
        return jax.tree.map(lambda x: _at(_at(x, self.batch, 0), self.head, 1), arrays)


def is_traced(lists: XlaLists) -> bool:
    """Whether the walks are traced: one table with an axis of maps."""
    walk = lists.forward.walks[0]
    return walk.long is not None and np.ndim(walk.long.row) == 2


def for_owners(
    run: Callable[[Owner], Any], inputs: Inputs, vectors: Vectors, lists: XlaLists
) -> Any:
    """Runs ``run`` for each owner and joins its results into ``[batch, heads, ...]``.

    If heads have walks of their own, each query head yields its own result. This holds
    for ``dk`` and ``dv`` too, which ``add_group`` sums.
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
    """Sums ``[batch, q_heads, ...]`` per key head; ``x`` if it has the key heads."""
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
