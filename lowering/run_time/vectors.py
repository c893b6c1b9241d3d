"""Evaluates expressions and hoisted vectors outside of kernels, on JAX arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowering import ir
from lowering.expr.evaluate import Jax, evaluate
from lowering.expr.fits import (
    INT32,
    check_64_bits,
    known_of,
    within,
)
from lowering.expr.static_range import Known
from lowering.run_time.packed import PackedBools
from pallas_kernels.call import WORD


def look_up(values: jax.Array | PackedBools, index: tuple, rank: int) -> jax.Array:
    """``values[b, index...]`` as int32 with ``rank`` axes, the batch axis first.

    ``values`` are ``[batch or 1, ...]``; the indices broadcast, perhaps with a batch
    axis of their own, and are clipped to the array.
    """
    if isinstance(values, PackedBools):
        last = jnp.clip(_of_rank(index[-1], rank), 0, values.length - 1)
        words = jax.lax.bitcast_convert_type(values.words, jnp.int32)
        word = look_up(words, (*index[:-1], last // WORD), rank)
        return (word >> (last % WORD).astype(jnp.int32)) & 1
    if not index:
        return values.astype(jnp.int32).reshape(-1, *(1,) * (rank - 1))
    limits = (size - 1 for size in values.shape[1:])
    parts = [
        jnp.clip(_of_rank(i, rank), 0, limit).astype(jnp.int32)
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
    """Whether no two indices vary along the same axis, and none along the batch."""
    axes = [i for part in parts for i, size in enumerate(part.shape) if size > 1]
    return len(set(axes)) == len(axes) and 0 not in axes


def _look_up_apart(values: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Looks up one axis after the other: no index is broadcast to the result."""
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
    x = jnp.asarray(x) if isinstance(x, jax.Array) else jnp.asarray(x, jnp.int32)
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


@dataclass(frozen=True)
class AtPositions(Jax):
    """Positions ``[1, 1, ...]`` and heads ``[1, heads, 1, ...]`` of equal rank.

    Operands have a batch axis in front.
    """

    def operand(self, name: str, index: tuple) -> Any:
        """The values, ``[batch or 1, heads or 1, ...]``."""
        return look_up(self.operands[name], index, rank=jnp.ndim(self.h))

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        """``values[index]`` by a gather, which kernels cannot do."""
        return jnp.asarray(values, jnp.int32)[index]

    def in_64_bits(self) -> "AtPositions":
        """The same positions as int64, for use inside of ``jax.enable_x64``."""
        q, k, h = (jnp.asarray(x, jnp.int64) for x in (self.q, self.k, self.h))
        return AtPositions64(q, k, h=h, operands=self.operands)


@dataclass(frozen=True)
class AtPositions64(AtPositions):
    """Positions and heads as int64."""

    def operand(self, name: str, index: tuple) -> Any:
        """The values as int64."""
        return super().operand(name, index).astype(jnp.int64)

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        """``values[index]`` as int64, by a gather."""
        return jnp.asarray(values, jnp.int64)[index]

    def log2(self, x: Any) -> Any:
        """The floor of the binary logarithm; 0 for values below 1."""
        return 63 - jax.lax.clz(jnp.maximum(x, 1))


def evaluate_outside(
    node: ir.Node, at: AtPositions, known: Known, dtype: Any = jnp.int32
) -> jax.Array:
    """``node`` at positions, in 64 bits if 32 may not hold some part of it.

    The values of an expression have ``dtype``, which must hold them; those of a
    predicate are bools.

    Raises:
      ValueError: 64 bits may not hold some part of the node.
    """
    if within(node, INT32, known):
        found = jnp.asarray(evaluate(node, at))
        return found.astype(dtype) if isinstance(node, ir.Expr) else found
    check_64_bits(node, known)
    with jax.enable_x64(True):
        found = jnp.asarray(evaluate(node, at.in_64_bits()))
        return found.astype(dtype) if isinstance(node, ir.Expr) else found


def vectors_of(
    exprs: tuple[ir.Expr, ...],
    length: int,
    num_heads: int,
    operands: Mapping[str, jax.Array],
) -> tuple[jax.Array, ...]:
    """The hoisted vectors over all positions: ``[batch or 1, heads or 1, length]``.

    ``operands`` are integers or bools ``[batch or 1, ...]``; an index has no entry for
    the batch axis.
    """
    position = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    head = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]
    at = AtPositions(position, position, h=head, operands=operands)
    known = known_of(length, length, num_heads)
    found = [evaluate_outside(expr, at, known) for expr in exprs]
    return tuple(jnp.broadcast_to(x, (*x.shape[:2], length)) for x in found)
