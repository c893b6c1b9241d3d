"""Solves ``A x = b`` for many symmetric positive definite matrices of size ``d``.

There is one system a query, whose ``A`` is the covariance of some ``m`` keys plus a
ridge. Conjugate gradients need products with ``A`` only, ``2 m d`` multiply-adds each.
Forming and factoring ``A`` takes ``m d^2 / 2 + d^3 / 3``, and its residual is smaller.

How many iterations a system needs is known only when it is solved. So they run until
they have cost as much as forming does, and then the systems are formed: that is at most
twice the better of the two (``Accuracy``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.varying import vary

# One vector for each system.
OfSystems: TypeAlias = Float[Array, "*lead d"]

# Up to this size a matrix is formed at once: that costs as much as 3 d / 4 iterations,
# and a system seldom needs fewer.
SMALL = 16
# Beyond this size none is formed. A query holds d^2 / 2 numbers for it.
LARGEST_FORMED = 128


@dataclass(frozen=True)
class Accuracy:
    """How well systems are solved: up to ``|b - A x| <= tolerance * |b|``.

    ``iterations`` is the greatest number of iterations, after which none is formed;
    None: as the module says.
    """

    tolerance: float
    iterations: int | None = None

    def forms_at_once(self, size: int) -> bool:
        """Whether there are no iterations for matrices of this size."""
        return self.iterations is None and size <= SMALL

    def forms_later(self, size: int) -> bool:
        """Whether systems that miss the tolerance are formed after the iterations."""
        return self.iterations is None and SMALL < size <= LARGEST_FORMED

    def most(self, size: int) -> int:
        """The greatest number of iterations.

        Without a number of the caller it is 3 d / 4, or 2 d where none is formed. On a
        CPU forming costs as much as d / 2 to 3 d / 4 iterations, at d from 32 to 128
        (``benchmarks/local_linear.py``).
        """
        if self.iterations is not None:
            return self.iterations
        return 3 * size // 4 if self.forms_later(size) else 2 * size


def by_factors(a: Float[Array, "*lead d d"], b: OfSystems) -> OfSystems:
    """``x`` with ``a x = b``, by the Cholesky factors of ``a``.

    NaN where ``a`` is not positive definite, as far as rounding tells.
    """
    lower = jnp.linalg.cholesky(a, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((lower, True), b[..., None])[..., 0]


def by_iterations(
    product: Callable[[OfSystems], OfSystems], b: OfSystems, accuracy: Accuracy
) -> OfSystems:
    """``x`` with ``product(x) = b``, by conjugate gradients on all systems at once.

    (Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems,
    1952, section 3.) It ends when all residuals are at most half the tolerance, since
    that of ``x`` itself differs from the recurrence by rounding.
    """
    most, norm = accuracy.most(b.shape[-1]), _squared(b)
    limit = (accuracy.tolerance / 2) ** 2 * norm

    def ahead(state: tuple) -> Array:
        done, *_, size = state
        return (done < most) & jnp.any(size > limit)

    def step(state: tuple) -> tuple:
        done, x, left, along, size = state
        moved = product(along)
        curve = jnp.sum(along * moved, axis=-1, keepdims=True)
        # A system that is solved exactly stays as it is.
        length = _quotient(size, curve)
        x, left = x + length * along, left - length * moved
        new = _squared(left)
        return done + 1, x, left, left + _quotient(new, size) * along, new

    x = vary(jnp.zeros_like(b), b)
    start = jnp.int32(0), x, b, b, norm
    return jax.lax.while_loop(ahead, step, start)[1]


def checked(
    x: OfSystems, left: OfSystems, b: OfSystems, accuracy: Accuracy
) -> tuple[OfSystems, Float[Array, "*lead 1"]]:
    """``x``, NaN where it misses the tolerance, and ``|left| / |b|`` (0 for b = 0)."""
    # A square root has no derivative at 0, and a residual needs none.
    size, of_b = (
        jnp.sqrt(_squared(jax.lax.stop_gradient(vector))) for vector in (left, b)
    )
    exact = (size == 0) & (of_b == 0)
    residual = jnp.where(exact, 0.0, size / jnp.where(exact, 1.0, of_b))
    return jnp.where(residual <= accuracy.tolerance, x, jnp.nan), residual


def corner(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of the upper triangle, and where each entry of a matrix is."""
    row, column = np.triu_indices(size)
    place = np.zeros((size, size), np.int32)
    place[row, column] = np.arange(len(row))
    return row, column, np.maximum(place, place.T)


def _squared(x: OfSystems) -> Float[Array, "*lead 1"]:
    return jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def _quotient(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
