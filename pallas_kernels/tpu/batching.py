"""The ``vmap`` rule of a kernel call: the mapped axis is folded into the batch axis.

The default rule of Pallas adds a grid axis and slices the operands that stay in HBM,
which the TPU lowering does not support.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.call import Vectors
from pallas_kernels.tpu.runs import TpuPlan
from pallas_kernels.tpu.segments import BackwardPlan

Arrays = tuple[jax.Array, ...]
PlanOf = TypeVar("PlanOf", TpuPlan, BackwardPlan)


def foldable(
    run: Callable[[Arrays, Vectors, PlanOf], Arrays],
) -> Callable[[Arrays, Vectors, PlanOf], Arrays]:
    """``run(arrays, vectors, plan)`` with a ``vmap`` rule.

    All arrays are ``[batch, heads, ...]``, and the first one has the query heads.
    """
    mapped = custom_vmap(run)

    @mapped.def_vmap
    def rule(
        axis_size: int, in_batched: Any, arrays: Arrays, vectors: Vectors, plan: Any
    ) -> tuple[Arrays, Any]:
        in_arrays, in_vectors, in_plan = in_batched
        batch, num_heads = arrays[0].shape[1:3] if in_arrays[0] else arrays[0].shape[:2]
        spread = jax.tree.map(lambda x, b: _spread(x, b, axis_size), arrays, in_arrays)
        vectors = jax.tree.map(
            lambda x, b: _fold_vector(x, b, axis_size, batch), vectors, in_vectors
        )
        if any(jax.tree.leaves(in_plan)):
            plan = _fold_plan(plan, in_plan, axis_size, (batch, num_heads))
        out = mapped(jax.tree.map(_fold, spread), vectors, plan)
        out = jax.tree.map(lambda x: x.reshape(axis_size, batch, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _spread(x: jax.Array, batched: bool, size: int) -> jax.Array:
    return x if batched else jnp.broadcast_to(x[None], (size, *x.shape))


def _fold(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _fold_vector(x: jax.Array, batched: bool, size: int, batch: int) -> jax.Array:
    if not batched and x.shape[0] == 1:
        return x
    x = _spread(x, batched, size)
    return _fold(jnp.broadcast_to(x, (size, batch, *x.shape[2:])))


def _fold_plan(
    plan: PlanOf, batched: PlanOf, size: int, batch_and_heads: tuple[int, int]
) -> PlanOf:
    """The plans of all examples as one: their tables, one after the other."""
    # Only traced plans differ between examples, and those are tables.
    assert plan.table is not None
    batch, num_heads = batch_and_heads
    table = _spread(plan.table, batched.table, size)

    def of_heads(x: jax.Array, is_batched: bool) -> jax.Array:
        x = _spread(x, is_batched, size).reshape(size, -1, num_heads)
        return jnp.broadcast_to(x, (size, batch, num_heads)).reshape(size, -1)

    first_row = of_heads(plan.first_row, batched.first_row)
    test_of_head = of_heads(plan.test_of_head, batched.test_of_head)
    offset = jnp.arange(size, dtype=jnp.int32)[:, None] * table.shape[1]
    return replace(
        plan,
        test_of_head=test_of_head.reshape(-1),
        first_row=(first_row + offset).reshape(-1),
        table=_fold(table),
    )
