"""The gradient of what is added to the scores: a walk over the blocks of the plan.

One implementation for all backends. It computes the probabilities once more, so that
who asks for no such gradient does not pay: the compiler drops the whole walk.
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
    """The gradient of ``vectors.scores``, summed over what shares an entry.

    Blocks are added one after the other, the same way every time.
    """
    values = vectors.scores
    if is_traced(lists):
        # Who has a walk of their own has a gradient of their own; they are added up.
        lead = inputs.q.shape[:2]
        own = vectors._replace(
            scores=jax.tree.map(
                lambda x: jnp.broadcast_to(x, (*lead, *x.shape[2:])), values
            )
        )

        def of_owner(owner: Owner) -> ScoreValues:
            args = owner.inputs, owner.of_queries(cotangents), owner.vectors
            return _gradient(*args, owner.plan(lists.backward), owner.group, call)

        found = for_owners(of_owner, inputs, own, lists)
        return jax.tree.map(_summed_like, found, values)
    groups = head_groups(lists.map_of_head, lists.test_of_map, inputs.k.shape[1])
    total = jax.tree.map(jnp.zeros_like, values)
    for group in groups:
        part = _gradient(inputs, cotangents, vectors, lists.backward, group, call)
        total = jax.tree.map(partial(_placed, group=group), total, part)
    return total


def _summed_like(x: Array, like: Array) -> Array:
    axes = tuple(i for i in (0, 1) if like.shape[i] == 1)
    return x.sum(axis=axes, keepdims=True)


def _placed(total: Array, part: Array, *, group: HeadGroup) -> Array:
    """``total`` with the gradient of the heads of a group."""
    if total.shape[1] == 1:
        return total + part
    return total.at[:, np.array(group.q_heads)].set(part)


def _gradient(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, plan: XlaPlan,
    group: HeadGroup, call: Call,
) -> ScoreValues:  # fmt: skip
    """The heads of one group: ``[batch or 1, heads of the group or 1, ...]``."""
    lengths = inputs.q.shape[2], inputs.k.shape[2]
    blocks = tile.operands(inputs, group, plan)
    pairs = tile.pairs_of(call, vectors, group, plan, lengths)
    added = pairs.scores
    assert added is not None
    lse = tile.to_blocks(
        tile.fold_heads(cotangents.lse, group), 3, plan.block_q, -jnp.inf
    )
    delta = tile.to_blocks(tile.fold_heads(cotangents.delta, group), 3, plan.block_q)
    do = tile.positions_first(pick(cotangents.do, group.q_heads), plan.block_q)
    size = lse.shape[2]

    def start(total: Pieces, row: Array) -> tuple[GradientRow, Pieces]:
        return row_of(row, blocks.q, do, lse, delta, call), total

    def fold(
        of_row: GradientRow, total: Pieces, block: Array, shown: tile.Shown
    ) -> Pieces:
        row = of_row.at
        k, v = (tile.gather(x, block, shown.seen) for x in (blocks.k, blocks.v))
        on_top = shown, pairs.factor(row, block, lse.dtype)
        _, _, gradient = gradient_of_added(of_row, k, v, on_top, (size, call))

        def spread(pieces: Pieces) -> Array:
            return jnp.broadcast_to(added.tile(pieces, row, block), gradient.shape)

        _, pull = jax.vjp(spread, added.pieces(row, block))
        return added.add(total, pull(gradient)[0], row, block)

    def close(fixed: GradientRow, total: Pieces, row: Array) -> Pieces:
        del fixed, row
        return total

    total = jax.tree.map(jnp.zeros_like, added.arrays)
    walk = plan.walks[group.map_index]
    total = fold_rows(walk, pairs, Pass(start, fold, close), total)
    found = added.restored(total)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), found)
