"""``local_linear``: a linear regression of the values for each query.

The linear systems of a row of blocks are solved at once, by conjugate gradients. Those
that still miss the tolerance when this has cost as much as forming their matrices are
formed and factored: head_dim up to 128 later, up to 16 at once. The gradient is that of
the exact solution; it solves a second system of the same tolerance. ``impl="xla"`` has
derivatives in reverse mode only, the second ones in quadratic memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import Spec, Term


@dataclass(frozen=True, repr=False)
class LocalLinear(Term):
    """A ridge regression of the values over the keys of a map; see ``local_linear``."""

    map: IndexMap
    ridge: float | str
    tolerance: float = 1e-4
    iterations: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"local_linear takes an index map, not {self.map!r}")
        if isinstance(self.ridge, str):
            check_operand_name("local_linear: ridge", self.ridge)
        elif not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise ValueError(
                f"local_linear: ridge={self.ridge} must be positive and finite: else a "
                "query that sees few keys has no unique regression; for the plain "
                "softmax, which an infinite ridge means, use softmax(map)"
            )
        if not 0 < self.tolerance < 1:
            raise ValueError(
                f"local_linear: tolerance={self.tolerance} must be between 0 and 1: it "
                "is the residual of a linear system, relative to its right side"
            )
        if self.iterations is not None:
            at_least("local_linear", "iterations", self.iterations, 1)

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The map."""
        return (self.map,)

    @property
    def operands(self) -> Mapping[str, int]:
        """The ridge of each head, if it is an operand."""
        return {self.ridge: 1} if isinstance(self.ridge, str) else {}

    @property
    def seen(self) -> IndexMap:
        """The map. It is no ``support``: weights of both signs share no normaliser."""
        return self.map

    def __repr__(self) -> str:
        return call_text(self)


def local_linear(
    map: IndexMap,
    ridge: float | str,
    tolerance: float = 1e-4,
    iterations: int | None = None,
) -> LocalLinear:
    """Local linear attention: for each query, a linear regression of the values.

    Softmax attention is a mean of the values with the weights ``w_j = exp(sm_scale * q
    . k_j)``. This term fits ``v_j ~ b + W (k_j - q)`` with the same weights and the
    penalty ``lambda |W|^2``; its output is ``b``, the fitted value at ``k = q`` (Local
    Linear Attention, 2025. A reconstruction: the formulas were derived and checked
    anew, but the paper's own kernel ``w``, its scale and its default of lambda are not
    verified, and no code was published).

    With the normalised weights ``p``, and the mean ``m`` and the covariance ``C`` of
    the keys under ``p``, the output is ``sum_j p_j (1 + (k_j - m) . x) v_j`` where ``(C
    + ridge I) x = q - m``. These weights add up to 1, and may be negative. As the ridge
    grows, the output becomes that of ``softmax(map)``; as it falls, values that are an
    affine function of the keys come out exactly. A query that sees no key yields 0. The
    lse is that of the softmax. ``sm_scale`` scales the scores only: the regression is
    read at ``q``, so queries and keys are vectors of one space.

    Where a system misses ``tolerance``, an eager call raises ``FloatingPointError``. A
    traced call (``jit``, ``vmap``) yields NaN for this query and head, and so do its
    gradients. ``local_linear_residual`` returns the residuals. In float32 they do not
    fall below about ``1e-7 |C| / ridge``: a ridge that is small beside the spread of
    the keys needs a larger tolerance, or float64. The module says how they are solved.

    Args:
      map: the pairs; a map that content decides has no gradient of its choice.
      ridge: the penalty of ``W``, positive, or the name of an operand ``[num_q_heads]``
        (or with a batch axis in front) of positive floats, which has a gradient. It is
        relative to the normalised weights ``p``: a lambda for the raw weights ``w``, as
        in the paper, is the ridge ``lambda * exp(-lse)``, which differs by query.
      tolerance: the greatest ``|q - m - (C + ridge I) x| / |q - m|``, below 1.
      iterations: the greatest number of iterations of conjugate gradients, after which
        no ``C`` is formed. None: as above, and ``2 * head_dim`` above 128.

    Raises:
      TypeError: the map is not an index map.
      ValueError: the ridge or the tolerance is not positive, or an operand's name is
        not an identifier.

    Example:
      Values that are linear in the keys; a mean of them would fall short of 2 q.

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> k = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> term = sa.local_linear(sa.causal(), ridge=1e-5)
      >>> out = sa.attention(k, k, 2 * k, term, impl="reference")
      >>> [round(x, 2) for x in out.ravel().tolist()]
      [0.0, 2.0, 4.0, 6.0]
    """
    ridge = ridge if isinstance(ridge, str) else float(ridge)
    return LocalLinear(map, ridge, float(tolerance), iterations)
