"""Takes what kernels cannot look up out of predicates: tables and run-time arrays.

Whatever reads one and depends on the query alone, or on the key alone, becomes a vector
that is computed once, outside of the kernel, and fetched with its block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lowering import ir
from lowering.predicate import Jax, evaluate


@dataclass(frozen=True)
class Hoists:
    """Maps without tables or operands in them, and the vectors that they read."""

    maps: tuple[ir.Pred, ...]
    q: tuple[ir.Expr, ...] = ()
    kv: tuple[ir.Expr, ...] = ()


def hoist(maps: tuple[ir.Pred, ...]) -> Hoists:
    """Replaces the largest such expressions by ``Hoisted``; equal ones share a slot."""
    slots: dict[ir.Side, dict[ir.Expr, int]] = {"q": {}, "k": {}}

    def change(node: ir.Node) -> ir.Node:
        if isinstance(node, ir.Expr) and (axis := _side(node)):
            slot = slots[axis].setdefault(node, len(slots[axis]))
            return ir.Hoisted(axis, slot)
        return ir.rebuild(node, change)

    changed = tuple(ir.rebuild(node, change) for node in maps)
    return Hoists(changed, tuple(slots["q"]), tuple(slots["k"]))


def _side(node: ir.Expr) -> ir.Side | None:
    """The side that the expression can be hoisted to, if it should and can be."""
    if not any(isinstance(n, ir.Table | ir.Operand) for n in ir.walk(node)):
        return None
    axes = ir.axes(node) - {"h"}
    if len(axes) > 1:
        return None
    return "k" if axes == {"k"} else "q"


@dataclass(frozen=True)
class _Vector(Jax):
    """Positions ``[1, 1, n]``, heads ``[1, heads, 1]``; operands with a batch axis."""

    def operand(self, name: str, index: Any) -> Any:
        values = self.operands[name]
        if index is None:
            return values[:, None, None]
        return values[:, index[0]]

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        return jnp.asarray(values, jnp.int32)[index]


def vectors(
    exprs: tuple[ir.Expr, ...],
    length: int,
    num_heads: int,
    operands: Mapping[str, jax.Array],
) -> tuple[jax.Array, ...]:
    """The hoisted vectors over all positions: ``[batch or 1, heads or 1, length]``.

    ``operands`` are int32 ``[batch or 1, ...]``, their last axis indexed.
    """
    position = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    head = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]
    at = _Vector(position, position, h=head, operands=operands)
    found = [jnp.asarray(evaluate(expr, at), jnp.int32) for expr in exprs]
    return tuple(jnp.broadcast_to(x, (*x.shape[:2], length)) for x in found)
