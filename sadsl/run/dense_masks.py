"""Dense masks and biases of other libraries as maps and biases of run-time operands.

Other libraries pass arrays that broadcast to ``[batch, heads, q_seq, kv_seq]``. An axis
of size 1 is no index of the operand. So a mask of padding, ``[batch, 1, 1, kv_seq]``,
is a vector over keys: it takes no memory for pairs, and blocks of padding are skipped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from sadsl.maps.base import IndexMap
from sadsl.maps.named import where
from sadsl.maps.numbers import weights
from sadsl.maps.symbols import operand
from sadsl.terms.biases import Bias, bias


class PairSizes(NamedTuple):
    """The sizes of a call that a dense array must fit."""

    batch: int
    heads: int
    q_seq: int
    kv_seq: int


def pairs_of(name: str, mask: Array, sizes: PairSizes) -> tuple[IndexMap, Array]:
    """The pairs where ``mask`` is true, as a map that reads the operand ``name``.

    Returns:
      The map, and the operand without the axes of size 1.

    Raises:
      ValueError: the mask does not broadcast to ``sizes``.
      TypeError: it does not hold bools or numbers.
    """
    axes = _axes(name, mask, sizes)
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.number)):
        raise TypeError(f"{name} has dtype {mask.dtype}: it must be bool")
    array = _squeezed(mask, axes)
    array = array.astype(bool)

    def pairs(q: Any, k: Any, h: Any) -> Any:
        index = _index(axes, q, k, h)
        return (operand(name)[index] if index else operand(name)) == 1

    return where(pairs), array


def bias_of(name: str, array: Array, sizes: PairSizes) -> tuple[Bias, Array]:
    """The numbers of ``array``, as a bias that reads the operand ``name``.

    Returns:
      The bias, and the operand without the axes of size 1.

    Raises:
      ValueError: the array does not broadcast to ``sizes``.
    """
    axes = _axes(name, array, sizes)

    def numbers(q: Any, k: Any, h: Any) -> Any:
        # An array has an axis at least: one number for all pairs is one for each head.
        return weights(name)[_index(axes, q, k, h) or (h,)]

    array = _squeezed(array, axes)
    return bias(numbers), array if any(axes[1:]) else array[..., None]


def _axes(name: str, array: Array, sizes: PairSizes) -> tuple[bool, ...]:
    """Which axes of the array are longer than 1, of four.

    Raises:
      ValueError: the array does not broadcast to the sizes.
    """
    shape = (1,) * (4 - array.ndim) + tuple(array.shape)
    fits = zip(shape, sizes, strict=False)
    if len(shape) != 4 or any(have not in (1, size) for have, size in fits):
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}: it must broadcast to [batch, "
            f"heads, q_seq, kv_seq] = {list(sizes)}"
        )
    return tuple(size > 1 for size in shape)


def _squeezed(array: Array, axes: tuple[bool, ...]) -> Array:
    shape = (1,) * (4 - array.ndim) + tuple(array.shape)
    return array.reshape([n for n, kept in zip(shape, axes, strict=True) if kept])


def _index(axes: Sequence[bool], q: Any, k: Any, h: Any) -> tuple[Any, ...]:
    return tuple(x for x, kept in zip((h, q, k), axes[1:], strict=True) if kept)
