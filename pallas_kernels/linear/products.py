"""Matrix products of a chunk, and the other operations that depend on the backend."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from pallas_kernels.precision import wide

# dot(a, b, (axis of a, axis of b)), accumulated in f32.
Dot: TypeAlias = Callable[[Any, Any, tuple[int, int]], Any]


@dataclass(frozen=True)
class Ops:
    """What a backend does in its own way.

    Attributes:
      dot: the product of operands rounded to the dtype of the inputs.
      solve: ``(I + lower)^-1 right`` for a strictly lower matrix; see ``inverse``.
      swapped: ``swapped(x, b)`` exchanges the halves of every block of ``2 b`` rows.
      column: a row ``[1, n]`` as a column ``[n, 1]``.
    """

    dot: Dot
    solve: Callable[[Any, Any], Any]
    swapped: Callable[[Any, int], Any]
    column: Callable[[Any], Any]


def plain_dot(dtype: Any) -> Dot:
    """The product of operands rounded to ``dtype``, with JAX's own derivative."""
    return partial(_product, dtype=jnp.dtype(dtype))


def kernel_dot(dtype: Any) -> Dot:
    """``plain_dot`` whose derivatives are such products too, without transposes."""
    return partial(_rounded, jnp.dtype(dtype))


def swapped_halves(x: Any, b: int) -> Any:
    """``x [chunk, n]`` with the halves of every block of ``2 b`` rows exchanged."""
    blocks = x.reshape(-1, 2, b, x.shape[-1])
    # Not every backend can reverse an axis.
    return jnp.concatenate([blocks[:, 1:], blocks[:, :1]], axis=1).reshape(x.shape)


def row_index(shape: tuple[int, int]) -> Any:
    """The row of each entry, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def column_index(shape: tuple[int, int]) -> Any:
    """The column of each entry, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def number(value: int | float, like: Any) -> Any:
    """``value`` in the dtype of ``like``.

    With ``jax_enable_x64``, a Python float is a float64, which kernels do not have.
    """
    return like.dtype.type(value)


def _product(a: Any, b: Any, contract: tuple[int, int], *, dtype: Any) -> Any:
    # 32-bit operands are multiplied in full precision; the default of chips is less.
    exact = dtype.itemsize >= 4
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=wide(dtype),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _rounded(dtype: Any, a: Any, b: Any, contract: tuple[int, int]) -> Any:
    return _product(a, b, contract, dtype=dtype)


def _rounded_fwd(dtype: Any, a: Any, b: Any, contract: tuple[int, int]) -> Any:
    return _product(a, b, contract, dtype=dtype), (a, b)


def _rounded_bwd(dtype: Any, contract: tuple[int, int], operands: Any, g: Any) -> Any:
    a, b = operands
    of_a, of_b = contract
    dot = plain_dot(dtype)
    da = dot(g, b, (1, 1 - of_b)) if of_a == 1 else dot(b, g, (1 - of_b, 1))
    db = dot(a, g, (1 - of_a, 0)) if of_b == 0 else dot(g, a, (0, 1 - of_a))
    return da, db


_rounded.defvjp(_rounded_fwd, _rounded_bwd)
