"""Pools the vectors of the tokens in each region, in time linear in the length.

The regions of the built-in partitions are runs, halves of runs or prefixes, so pools
are reshapes and scans. Sums and maxima are taken in float32 (float64 for float64).
"""

from functools import partial
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.precision import widened
from sadsl.terms.grid_regions import Columns, Part, Rowmajor, Rows
from sadsl.terms.own_regions import Regions
from sadsl.terms.regions import RADIX, Partition, Pool, Spans, Tower

Op = Literal["max", "sum"]


@partial(jax.jit, static_argnames=("partition", "pool"))
def pooled(
    x: Float[Array, "batch n heads dim"],
    valid: Bool[Array, "batch_or_1 n"] | None = None,
    *,
    partition: Partition,
    pool: Pool,
) -> Float[Array, "batch regions heads dim"]:
    """The pool of the members of each region, in the dtype of ``x``.

    A region without members yields 0. Only ``valid`` tokens are members; all are if
    None. The gradient of a maximum goes to the members that attain it, in equal shares.
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
    """The number of tokens of each region that are ``there``, int32."""
    return aggregated(there.astype(jnp.int32), partition, "sum")


def aggregated(x: Array, partition: Partition, op: Op) -> Array:
    """Sums or maxima over members: ``[batch, n, ...]`` to ``[batch, regions, ...]``.

    Raises:
      TypeError: the partition has no pools.
    """
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
            # The region of each token of a row holds the whole row.
            whole = _reduce(_grid(x, width, op), op, 2)
            return jnp.repeat(whole, width, axis=1)[:, : x.shape[1]]
        case Regions():
            return _one_by_one(x, partition, op)
        case _:
            raise TypeError(f"{partition!r} is not a partition with pools")


def _one_by_one(x: Array, partition: Regions, op: Op) -> Array:
    """Pools region by region; the gradient recomputes, so that only ``x`` is kept."""
    masks = jnp.asarray(partition.held(x.shape[1]))

    @jax.checkpoint
    def of_region(mask: Array) -> Array:
        inside = mask.reshape(1, -1, *(1 for _ in x.shape[2:]))
        return _reduce(jnp.where(inside, x, _nothing(op, x.dtype)), op, 1)

    return jnp.moveaxis(jax.lax.map(of_region, masks), 0, 1)


def _nothing(op: Op, dtype: jnp.dtype) -> Array:
    """The neutral element: 0 for sums, -inf for maxima."""
    if op == "sum":
        return jnp.zeros((), dtype)
    return jnp.array(-jnp.inf, dtype)


def _reduce(x: Array, op: Op, axis: int) -> Array:
    return x.max(axis=axis) if op == "max" else x.sum(axis=axis)


def _grid(x: Array, width: int, op: Op) -> Array:
    """``[batch, rows, width, ...]``; the last row is padded with neutral elements."""
    batch, n, *rest = x.shape
    rows = -(-n // width)
    pads = [(0, 0), (0, rows * width - n), *((0, 0) for _ in rest)]
    padded = jnp.pad(x, pads, constant_values=_nothing(op, x.dtype))
    return padded.reshape(batch, rows, width, *rest)


def _along(x: Array, width: int, axis: int, part: Part, op: Op) -> Array:
    """Pools, for each cell, other cells of its row or column.

    ``part`` says which: those before it along ``axis`` of the grid, those after it, or
    all others.
    """
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
    """The running pool along an axis, of the entries before (or after) each one."""
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
    """Pools dyadic spans: each level from the one below, then those of the regions."""
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
    """The index of each region among the spans of all levels.

    An empty region has the index of the neutral element behind the last span.
    """
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
