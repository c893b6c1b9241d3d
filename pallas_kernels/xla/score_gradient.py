"""The gradient of learned scores: a loop over the blocks of the plan, in plain JAX.

All backends use it. It computes the probabilities again, apart from the other
gradients. So XLA removes the whole loop if its result is not used.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.call import (
    Call,
    Cotangents,
    Inputs,
    ScoreValues,
    Vectors,
)
from pallas_kernels.xla import tile
from pallas_kernels.xla.added import Pieces
from pallas_kernels.xla.backward import GradientRow, gradient_of_added, row_of
from pallas_kernels.xla.heads import HeadGroup, head_groups, pick
from pallas_kernels.xla.rows import Pass, fold_rows
from pallas_kernels.xla.traced_walks import Owner, for_owners, is_traced
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan


def score_gradient(
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: XlaLists,
    call: Call,
) -> ScoreValues:
    """The gradient of ``vectors.scores``, summed over all pairs that share an entry.

    Blocks are added in a fixed order, so results repeat bit by bit.
    """
    values = vectors.scores
    if is_traced(lists):
        # Each traced walk yields its own gradient; they are summed.
        lead = inputs.q.shape[:2]
        own = vectors._replace(
            scores=jax.tree.map(
                lambda x: jnp.broadcast_to(x, (*lead, *x.shape[2:])), values
            )
        )

        def of_owner(owner: Owner) -> ScoreValues:
            args = owner.inputs, owner.of_queries(cotangents), owner.vectors
            return _gradient(*args, owner.plan(lists.backward), owner.heads, call)

        found = for_owners(of_owner, inputs, own, lists)
        return jax.tree.map(_summed_like, found, values)
    groups = head_groups(lists.map_of_head, lists.test_of_map, inputs.k.shape[1])
    total = jax.tree.map(jnp.zeros_like, values)
    for heads in groups:
        part = _gradient(inputs, cotangents, vectors, lists.backward, heads, call)
        total = jax.tree.map(partial(_placed, heads=heads), total, part)
    return total


def _summed_like(x: Array, like: Array) -> Array:
    axes = tuple(i for i in (0, 1) if like.shape[i] == 1)
    return x.sum(axis=axes, keepdims=True)


def _placed(total: Array, part: Array, *, heads: HeadGroup) -> Array:
    """``total`` with the gradient ``part`` of the heads of a group."""
    if total.shape[1] == 1:
        return total + part
    return total.at[:, np.array(heads.q_heads)].set(part)


def _gradient(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, plan: XlaPlan,
    heads: HeadGroup, call: Call,
) -> ScoreValues:  # fmt: skip
    """The gradient of one group: ``[batch or 1, heads of the group or 1, ...]``."""
    lengths = inputs.q.shape[2], inputs.k.shape[2]
    blocks = tile.operands(inputs, heads, plan)
    pairs = tile.pairs_of(call, vectors, heads, plan, lengths)
    added = pairs.scores
    assert added is not None
    lse = tile.to_blocks(
        tile.fold_heads(cotangents.lse, heads), 3, plan.block_q, -jnp.inf
    )
    delta = tile.to_blocks(tile.fold_heads(cotangents.delta, heads), 3, plan.block_q)
    do = tile.positions_first(pick(cotangents.do, heads.q_heads), plan.block_q)
    group = lse.shape[2]

    def start(total: Pieces, row: Array) -> tuple[GradientRow, Pieces]:
        return row_of(row, blocks.q, do, lse, delta, call), total

    def fold(
        of_row: GradientRow, total: Pieces, block: Array, shown: tile.Shown
    ) -> Pieces:
        row = of_row.at
        k, v = (tile.gather(x, block, shown.seen) for x in (blocks.k, blocks.v))
        factor = pairs.factor(row, block, lse.dtype)
        _, _, gradient = gradient_of_added(of_row, k, v, shown, factor, group, call)

        def spread(pieces: Pieces) -> Array:
            return jnp.broadcast_to(added.tile(pieces, row, block), gradient.shape)

        _, pull = jax.vjp(spread, added.pieces(row, block))
        return added.add(total, pull(gradient)[0], row, block)

    def close(fixed: GradientRow, total: Pieces, row: Array) -> Pieces:
        del fixed, row
        return total

    total = jax.tree.map(jnp.zeros_like, added.arrays)
    walk = plan.walks[heads.map_index]
    total = fold_rows(walk, pairs, Pass(start, fold, close), total)
    found = added.restored(total)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), found)
