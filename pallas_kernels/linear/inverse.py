"""Solves the unit lower triangular system of a chunk of a delta rule."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.products import Dot, column_index, number, row_index


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(dot: Dot, lower: Any, right: Any) -> Any:
    """``(I + lower)^-1 right`` for a strictly lower ``[chunk, chunk]``.

    JAX differentiates it in both modes, to any order.
    """
    return dot(inverse(lower, dot), right, (1, 0))


@solve.defjvp
def _(dot: Dot, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # (I + A) U = R, so dU = (I + A)^-1 (dR - dA U).
    (lower, right), (dlower, dright) = primals, tangents
    inverted = inverse(lower, dot)
    u = dot(inverted, right, (1, 0))
    return u, dot(inverted, dright - dot(dlower, u, (1, 0)), (1, 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernel_solve(dot: Dot, lower: Any, right: Any) -> Any:
    """``solve`` for kernels: only its reverse mode, without transposed operands."""
    return dot(inverse(lower, dot), right, (1, 0))


def _forward(dot: Dot, lower: Any, right: Any) -> tuple[Any, tuple[Any, Any]]:
    inverted = inverse(lower, dot)
    u = dot(inverted, right, (1, 0))
    return u, (inverted, u)


def _backward(dot: Dot, kept: tuple[Any, Any], du: Any) -> tuple[Any, Any]:
    inverted, u = kept
    dright = dot(inverted, du, (0, 0))
    return -dot(dright, u, (1, 1)), dright


kernel_solve.defvjp(_forward, _backward)


def inverse(lower: Any, dot: Dot) -> Any:
    """``(I + lower)^-1`` by recursion on halves, for a strictly lower matrix.

    The inverse of a block ``[[P, 0], [X, Q]]`` is ``[[P', 0], [-Q' X P', Q']]``, with
    ``P'`` and ``Q'`` the inverses of its halves. All blocks of one size are done in two
    products. Its powers are never formed: the Neumann series overflows if keys repeat.
    """
    size = lower.shape[0]
    apart = row_index(lower.shape) ^ column_index(lower.shape)
    zero = number(0.0, lower)
    found = jnp.where(apart == 0, number(1.0, lower), zero)
    found -= jnp.where(apart == 1, lower, zero)
    half = 2
    while half < size:
        corner = jnp.where((apart >= half) & (apart < 2 * half), lower, zero)
        found -= dot(dot(found, corner, (1, 0)), found, (1, 0))
        half *= 2
    return found
