"""The channels of queries and keys as tiles, each with a power of two of channels.

Triton cannot cut a loaded tile. So where values are the first channels of the keys
(``Call.values``), the values are one part of a key and the other channels another:
each is loaded once, and the scores are the sum of two products.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import softmax
from pallas_kernels.shared_values import Values
from pallas_kernels.triton.tiles import power_of_two

# The tiles of some queries or keys, one for each part of the channels.
Parts = tuple[jax.Array, ...]


def padded_dim(head_dim: int, values: Values | None) -> int:
    """The channels of queries and keys with those that are added as padding.

    Example:
      >>> padded_dim(576, None), padded_dim(576, (0, 512)), padded_dim(512, (0, 512))
      (1024, 576, 512)
    """
    if values is None:
        return power_of_two(head_dim)
    rest = head_dim - values[1]
    return values[1] + (power_of_two(rest) if rest else 0)


def parts_of(dim: int, values: Values | None) -> list[tuple[int, int]]:
    """The first channel and the size of each part of ``padded_dim`` channels."""
    split = dim if values is None else values[1]
    return [part for part in ((0, split), (split, dim - split)) if part[1]]


def load(ref: Any, index: tuple, values: Values | None) -> Parts:
    """The rows ``ref[*index]`` of queries or keys, in parts."""
    parts = parts_of(ref.shape[-1], values)
    return tuple(ref[*index, pl.ds(*part)] for part in parts)


def store(ref: Any, index: tuple, parts: Parts, values: Values | None) -> None:
    """Writes what ``load`` reads."""
    places = parts_of(ref.shape[-1], values)
    for place, x in zip(places, parts, strict=True):
        ref[*index, pl.ds(*place)] = x.astype(ref.dtype)


def zeros(like: Parts) -> Parts:
    """The start of a sum in f32."""
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in like)


def products(a: Parts, b: Parts) -> jax.Array:
    """``a b^T`` over all channels."""
    found = [softmax.dot(x, y, contract=(1, 1)) for x, y in zip(a, b, strict=True)]
    return sum(found[1:], found[0])


def added(total: Parts, weights: jax.Array, rows: Parts) -> Parts:
    """``total + weights rows``."""
    return tuple(
        x + softmax.dot(weights.astype(y.dtype), y, contract=(1, 0))
        for x, y in zip(total, rows, strict=True)
    )


def added_pairs(
    totals: tuple, weights: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, Parts],
    sm_scale: float,
) -> tuple:  # fmt: skip
    """``totals``, those of ``dk`` and of ``dv``, with the terms of some pairs.

    ``weights`` are ``p`` and ``ds [keys, queries]``, and ``rows`` are ``do`` and ``q``.
    Without ``dv``, values are the first part of the keys. Then ``dk`` has the terms of
    both, those of keys times ``sm_scale``.
    """
    (dk, *dv), (p, ds), (do, q) = totals, weights, rows
    if dv:
        return added(dk, ds, q), *added(tuple(dv), p, (do,))
    dk = *added(dk[:1], p, (do,)), *dk[1:]
    return (added(dk, ds * sm_scale, q),)


def all_finite(parts: Parts) -> jax.Array:
    """Whether all elements are finite."""
    found = [softmax.all_finite(x) for x in parts]
    return functools.reduce(operator.and_, found)
