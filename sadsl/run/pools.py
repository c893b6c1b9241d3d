"""One vector a region: the pool of what its members are, in linear time.

Regions of a partition are runs, halves of runs or prefixes, so that pools come of
reshapes and scans. Sums and maxima are taken in float32 (float64 for float64).
"""

from functools import partial
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.precision import widened
from sadsl.terms.own_regions import Regions
from sadsl.terms.regions import (
    RADIX,
    Columns,
    Part,
    Partition,
    Pool,
    Rowmajor,
    Rows,
    Spans,
    Tower,
)

Op = Literal["max", "sum"]


@partial(jax.jit, static_argnames=("partition", "pool"))
def pooled(
    x: Float[Array, "batch n heads dim"],
    valid: Bool[Array, "batch_or_1 n"] | None = None,
    *,
    partition: Partition,
    pool: Pool,
) -> Float[Array, "batch regions heads dim"]:
    """The pool of the members of each region, in the dtype of ``x``; 0 for none.

    Only ``valid`` tokens are members, all if None. The gradient of a maximum goes to
    where it is found, in equal shares among equals.
    """
    there = jnp.ones((1, x.shape[1]), bool) if valid is None else valid
    x_wide = widened(x)
    mask = there[..., None, None]
    counts = counted(there, partition=partition)[..., None, None]
    op: Op = "max" if pool == "max" else "sum"
    filled = jnp.where(mask, x_wide, _nothing(op, x_wide.dtype))
    found = aggregated(filled, partition, op)
    if pool == "mean":
        found = found / jnp.maximum(counts, 1).astype(found.dtype)
    return jnp.where(counts > 0, found, 0).astype(x.dtype)


@partial(jax.jit, static_argnames="partition")
def counted(there: Bool[Array, "batch_or_1 n"], *, partition: Partition) -> Array:
    """How many of the tokens that are ``there`` each region has, int32."""
    return aggregated(there.astype(jnp.int32), partition, "sum")


def aggregated(x: Array, partition: Partition, op: Op) -> Array:
    """Sums or maxima over members: ``[batch, n, ...]`` to ``[batch, regions, ...]``."""
    match partition:
        case Spans(size=size):
            return _reduce(_grid(x, size, op), op, 2)
        case Tower():
            return _dyadic(x, partition, op)
        case Columns(width=width):
            return _along(x, width, 1, partition.side, op)
        case Rows(width=width, part=part):
            return _along(x, width, 2, part, op)
        case Rowmajor(width=width):
            # All tokens of a row have its members.
            whole = _reduce(_grid(x, width, op), op, 2)
            return jnp.repeat(whole, width, axis=1)[:, : x.shape[1]]
        case Regions():
            return _one_by_one(x, partition, op)
        case _:
            raise TypeError(f"{partition!r} is not a partition with pools")


def _one_by_one(x: Array, partition: Regions, op: Op) -> Array:
    """Region by region, nothing kept for the gradient but ``x``."""
    masks = jnp.asarray(partition.held(x.shape[1]))

    @jax.checkpoint
    def of_region(mask: Array) -> Array:
        inside = mask.reshape(1, -1, *(1 for _ in x.shape[2:]))
        return _reduce(jnp.where(inside, x, _nothing(op, x.dtype)), op, 1)

    return jnp.moveaxis(jax.lax.map(of_region, masks), 0, 1)


def _nothing(op: Op, dtype: jnp.dtype) -> Array:
    """What a pool is unchanged by."""
    if op == "sum":
        return jnp.zeros((), dtype)
    return jnp.array(-jnp.inf, dtype)


def _reduce(x: Array, op: Op, axis: int) -> Array:
    return x.max(axis=axis) if op == "max" else x.sum(axis=axis)


def _grid(x: Array, width: int, op: Op) -> Array:
    """``[batch, rows, width, ...]``, filled up with nothing."""
    batch, n, *rest = x.shape
    rows = -(-n // width)
    pads = [(0, 0), (0, rows * width - n), *((0, 0) for _ in rest)]
    padded = jnp.pad(x, pads, constant_values=_nothing(op, x.dtype))
    return padded.reshape(batch, rows, width, *rest)


def _along(x: Array, width: int, axis: int, part: Part, op: Op) -> Array:
    """Over the others of a row or a column, or those on one side of each cell."""
    grid = _grid(x, width, op)
    match part:
        case "before":
            found = _exclusive(grid, axis, op, reverse=False)
        case "after":
            found = _exclusive(grid, axis, op, reverse=True)
        case "others":
            sides = (_exclusive(grid, axis, op, reverse=r) for r in (False, True))
            left, right = sides
            found = jnp.maximum(left, right) if op == "max" else left + right
        case _:
            assert_never(part)
    return found.reshape(x.shape[0], -1, *x.shape[2:])


def _exclusive(x: Array, axis: int, op: Op, *, reverse: bool) -> Array:
    """The running pool along an axis, without the entry itself."""
    one = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    nothing = jnp.full_like(one, _nothing(op, x.dtype))
    size = x.shape[axis]
    if reverse:
        moved = (jax.lax.slice_in_dim(x, 1, size, axis=axis), nothing)
    else:
        moved = (nothing, jax.lax.slice_in_dim(x, 0, size - 1, axis=axis))
    run = jax.lax.cummax if op == "max" else jax.lax.cumsum
    return run(jnp.concatenate(moved, axis=axis), axis=axis, reverse=reverse)


def _dyadic(x: Array, partition: Tower, op: Op) -> Array:
    """Level by level, each from the one below, then the regions that there are."""
    n = x.shape[1]
    level, levels, starts = x, [x], [0]
    while level.shape[1] > 1:
        half = level.shape[1] // 2
        pairs = level[:, : 2 * half].reshape(x.shape[0], half, 2, *x.shape[2:])
        starts.append(starts[-1] + level.shape[1])
        level = _reduce(pairs, op, 2)
        levels.append(level)
    at = _places(n, partition, starts)
    nothing = jnp.full_like(x[:, :1], _nothing(op, x.dtype))
    return jnp.take(jnp.concatenate([*levels, nothing], axis=1), at, axis=1)


def _places(n: int, partition: Tower, starts: list[int]) -> np.ndarray:
    """Where each region is among all levels; the end stands for an empty one."""
    end = starts[-1] + 1
    found = []
    for group, (_, count, _) in enumerate(partition.groups(n)):
        t = np.arange(count)
        low = np.where(t % RADIX, t & -t, 1)
        bits = np.log2(low).astype(np.int64)
        level = np.minimum(group * (RADIX.bit_length() - 1) + bits, len(starts) - 1)
        at = np.asarray(starts)[level] + t // low - 1
        found.append(np.where(t % RADIX, at, end))
    return np.concatenate(found).astype(np.int32)
