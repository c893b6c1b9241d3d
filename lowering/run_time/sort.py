"""Sorts positions by a run-time label, so that a clustered map has dense blocks.

This is the traced counterpart of a ``Layout``. Queries and keys are sorted by the label
that a term of the map compares. The map selects the same pairs of positions, and the
visited blocks are those in which equal labels meet.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import jax.numpy as jnp
from jaxtyping import Array, Int32

from lowering import ir
from lowering.expr.static_range import Span
from lowering.pipeline import Program, Stages
from lowering.pipeline import hoist as hoist_program
from lowering.run_time.adjoint import linear
from lowering.run_time.vectors import vectors_of

# The operands that hold the orders. No identifier: no user can give such a name.
ORDER: Mapping[ir.Side, str] = {"q": " order of q", "k": " order of k"}


@dataclass(frozen=True)
class SortKeys:
    """The labels to sort by, of the queries and of the keys."""

    q: ir.Expr
    kv: ir.Expr


def keys(program: Program, orders: Collection[tuple[str, str]]) -> SortKeys | None:
    """The labels to sort by, or None if not every map has a term that compares them.

    ``orders`` are pairs of names of run-time arrays, of the queries and of the keys.
    """
    for q_name, k_name in orders:
        found = [_labels(node, q_name, k_name) for node in program.maps]
        if found and found[0] is not None and len(set(found)) == 1:
            return found[0]
    return None


def _labels(node: ir.Pred, q_name: str, k_name: str) -> SortKeys | None:
    terms = node.terms if isinstance(node, ir.And) else (node,)
    for term in terms:
        comparison = isinstance(term, ir.Le | ir.Eq | ir.In)
        if not comparison or {*ir.operand_names(term)} != {q_name, k_name}:
            continue
        parts = {n for n in ir.walk(term) if isinstance(n, ir.Operand)}
        q = [n for n in parts if n.name == q_name and "q" in ir.axes(n)]
        k = [n for n in parts if n.name == k_name and "k" in ir.axes(n)]
        if len(q) == len(k) == 1:
            return SortKeys(q[0], k[0])
    return None


@lru_cache(maxsize=256)
def sorted_stages(stages: Stages) -> Stages:
    """The stages with every position read from the operands ``ORDER``."""
    program = stages["simplify"]
    new: dict[ir.Axis, ir.Expr] = {
        "q": ir.Operand(ORDER["q"], (ir.H, ir.Q)),
        "k": ir.Operand(ORDER["k"], (ir.H, ir.K)),
    }
    moved = replace(
        program, maps=tuple(ir.substitute(node, new) for node in program.maps)
    )
    problem = program.problem
    lengths = {"q": problem.q_seq_len, "k": problem.kv_seq_len}
    positions: dict[str, Span] = {
        name: (0, lengths[side] - 1) for side, name in ORDER.items()
    }
    hoisted = hoist_program(moved, positions)
    kept = [(name, p) for name, p in stages.named if name != hoist_program.__name__]
    return Stages((*kept, ("sort", moved), (hoist_program.__name__, hoisted)))


@dataclass(frozen=True)
class Orders:
    """The position in every slot and the slot of every position, for each head.

    All arrays are ``[batch or 1, num_heads, length]``.
    """

    q: Int32[Array, "batch heads q"]
    q_slots: Int32[Array, "batch heads q"]
    kv: Int32[Array, "batch heads kv"]
    kv_slots: Int32[Array, "batch heads kv"]

    @property
    def operands(self) -> dict[str, Array]:
        """The arrays that ``sorted_stages`` read."""
        return {ORDER["q"]: self.q, ORDER["k"]: self.kv}

    def to_slots(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """``q, k, v [batch, seq, heads, dim]`` sorted; keys get one head a query head.

        Query heads that share a key head may each sort it differently.
        """
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (k, v))
        k, v = (permute(x, self.kv, self.kv_slots) for x in (k, v))
        return permute(q, self.q, self.q_slots), k, v

    def to_positions(self, o: Array, lse: Array) -> tuple[Array, Array]:
        """``o [batch, q, heads, dim]`` and ``lse [batch, heads, q]`` by position."""
        lse = permute(jnp.swapaxes(lse, 1, 2), self.q_slots, self.q)
        return permute(o, self.q_slots, self.q), jnp.swapaxes(lse, 1, 2)


def orders(by: SortKeys, program: Program, arrays: Mapping[str, Array]) -> Orders:
    """The orders by label; positions of one label keep their order."""
    problem = program.problem

    def sort(label: ir.Expr, length: int) -> tuple[Array, Array]:
        (values,) = vectors_of((label,), length, problem.num_heads, arrays)
        shape = (values.shape[0], problem.num_heads, length)
        order = jnp.argsort(jnp.broadcast_to(values, shape), axis=2, stable=True)
        slots = jnp.argsort(order, axis=2)
        return order.astype(jnp.int32), slots.astype(jnp.int32)

    q = sort(by.q, problem.q_seq_len)
    kv = sort(by.kv, problem.kv_seq_len)
    return Orders(*q, *kv)


def permute(x: Array, order: Array, inverse: Array) -> Array:
    """``x[b, order[b, h, i], h]`` for ``x [batch, seq, heads, ...]``: a permutation.

    The transpose is the inverse permutation: a gather too, never a scatter-add.
    """
    return linear(_gather, _put_back, x, order, inverse)


def _gather(x: Array, order: Array, inverse: Array) -> Array:
    del inverse
    at = jnp.swapaxes(order, 1, 2)
    at = jnp.broadcast_to(at, (x.shape[0], *at.shape[1:]))
    at = at.reshape(*at.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, at, axis=1, mode="clip")


def _put_back(x: Array, order: Array, inverse: Array) -> Array:
    return _gather(x, inverse, order)
