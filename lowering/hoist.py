"""Takes what kernels cannot look up out of predicates: tables and run-time arrays.

Whatever reads one and depends on the query alone, or on the key alone, becomes a vector
that is computed once, outside of the kernel, and fetched with its block. A comparison
that looks up a pair becomes a bit of every pair (``lowering/bits.py`` packs them).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowering import ir
from lowering.predicate import Jax, evaluate


@dataclass(frozen=True)
class Hoists:
    """Maps without tables or operands in them, and the vectors and bits they read."""

    maps: tuple[ir.Pred, ...]
    q: tuple[ir.Expr, ...] = ()
    kv: tuple[ir.Expr, ...] = ()
    bits: tuple[ir.Pred, ...] = ()


def hoist(maps: tuple[ir.Pred, ...]) -> Hoists:
    """Replaces the largest such expressions by ``Hoisted``; equal ones share a slot."""
    slots: dict[ir.Side, dict[ir.Expr, int]] = {"q": {}, "k": {}}
    bits: dict[ir.Pred, int] = {}

    def change(node: ir.Node) -> ir.Node:
        if isinstance(node, ir.Expr) and (axis := _side(node)):
            slot = slots[axis].setdefault(node, len(slots[axis]))
            return ir.Hoisted(axis, slot)
        if isinstance(node, ir.Expr) or not _is_look_up(node):
            return ir.rebuild(node, change)
        return ir.HoistedBits(bits.setdefault(node, len(bits)))

    changed: Any = tuple(change(node) for node in maps)
    return Hoists(changed, tuple(slots["q"]), tuple(slots["k"]), tuple(bits))


def _side(node: ir.Expr) -> ir.Side | None:
    """The side that the expression can be hoisted to, if it should and can be."""
    if not any(isinstance(n, ir.Table | ir.Operand) for n in ir.walk(node)):
        return None
    axes = ir.axes(node) - {"h"}
    if len(axes) > 1:
        return None
    return "k" if axes == {"k"} else "q"


def _is_look_up(node: ir.Pred) -> bool:
    comparison = isinstance(node, ir.Le | ir.Eq | ir.In | ir.PowerOfTwo)
    return comparison and looks_up_pairs(node)


def looks_up_pairs(node: ir.Pred) -> bool:
    """Whether the node reads a run-time array at both the query and the key."""
    return any(
        isinstance(n, ir.Operand) and {"q", "k"} <= ir.axes(n) for n in ir.walk(node)
    )


def look_up(values: jax.Array, index: tuple, rank: int) -> jax.Array:
    """``values[b, index...]`` as int32 of ``rank`` axes, the batch axis first.

    ``values`` are ``[batch or 1, ...]``; the indices broadcast, perhaps with a batch
    axis of their own, and are clipped to the array.
    """
    if not index:
        return values.astype(jnp.int32).reshape(-1, *(1,) * (rank - 1))
    limits = (size - 1 for size in values.shape[1:])
    parts = [
        jnp.clip(_of_rank(i, rank), 0, limit)
        for i, limit in zip(index, limits, strict=True)
    ]
    if _are_apart(parts):
        return _look_up_apart(values, parts).astype(jnp.int32)
    parts = jnp.broadcast_arrays(*parts)
    if parts[0].shape[0] == 1:
        found = values[(slice(None), *(part[0] for part in parts))]
    else:
        spread = jnp.broadcast_to(values, (parts[0].shape[0], *values.shape[1:]))
        found = jax.vmap(lambda x, at: x[at])(spread, tuple(parts))
    return found.astype(jnp.int32)


def _are_apart(parts: list[jax.Array]) -> bool:
    """Whether no two indices vary along one axis, and none with the batch."""
    axes = [i for part in parts for i, size in enumerate(part.shape) if size > 1]
    return len(set(axes)) == len(axes) and 0 not in axes


def _look_up_apart(values: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Rows, then columns: the indices are never spread over all of what is found."""
    rank, order, shape = parts[0].ndim, [], []
    for axis, part in enumerate(parts):
        values = jnp.take(values, part.reshape(-1), axis=axis + 1, mode="clip")
        mine = [i for i, size in enumerate(part.shape) if size > 1]
        order += mine
        shape += [part.shape[i] for i in mine]
    values = values.reshape(values.shape[0], *shape)
    values = jnp.transpose(values, (0, *(1 + i for i in np.argsort(order))))
    sizes = dict(zip(order, shape, strict=True))
    return values.reshape(values.shape[0], *(sizes.get(i, 1) for i in range(1, rank)))


def _of_rank(x: Any, rank: int) -> jax.Array:
    x = jnp.asarray(x, jnp.int32)
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


@dataclass(frozen=True)
class AtPositions(Jax):
    """Positions ``[1, 1, ...]``, heads ``[1, heads, 1, ...]`` of one rank.

    Operands have a batch axis in front.
    """

    def operand(self, name: str, index: tuple) -> Any:
        """The values, ``[batch or 1, heads or 1, ...]``."""
        return look_up(self.operands[name], index, rank=jnp.ndim(self.h))

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        """A gather, which arrays outside of kernels have."""
        return jnp.asarray(values, jnp.int32)[index]


def vectors(
    exprs: tuple[ir.Expr, ...],
    length: int,
    num_heads: int,
    operands: Mapping[str, jax.Array],
) -> tuple[jax.Array, ...]:
    """The hoisted vectors over all positions: ``[batch or 1, heads or 1, length]``.

    ``operands`` are integers or bools ``[batch or 1, ...]``, indexed but for the batch.
    """
    position = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    head = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]
    at = AtPositions(position, position, h=head, operands=operands)
    found = [jnp.asarray(evaluate(expr, at), jnp.int32) for expr in exprs]
    return tuple(jnp.broadcast_to(x, (*x.shape[:2], length)) for x in found)
