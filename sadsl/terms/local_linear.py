"""``local_linear``: a linear regression of the values for each query."""

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
                f"local_linear: ridge={self.ridge} must be positive and finite: a query "
                "that sees few keys has no other unique regression; for the plain "
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

    Softmax attention is the mean of the values, weighted by ``w_j = exp(sm_scale * q .
    k_j)``. This term fits ``v_j ~ b + W (k_j - q)`` with the same weights, and its
    output is ``b``, the value at ``k = q`` (Local Linear Attention, 2025, named in
    README's list; reconstruction: the published kernel and its scale were not seen, and
    no code was). With the normalised weights ``p``, and the mean ``m`` and the
    covariance ``C`` of the keys under ``p``, the output is ``sum_j p_j (1 + (k_j - m) .
    x) v_j`` where ``(C + ridge I) x = q - m``. These weights add up to 1, and may be
    negative. As the ridge grows, the output becomes that of ``softmax(map)``. As it
    falls, values that are an affine function of the keys come out exactly.

    The regression is read at ``q`` itself, so queries and keys must be vectors of one
    space. ``sm_scale`` scales the scores only. A query that sees no key yields 0.

    The map may be any map, decided by positions or by content; a choice has no gradient.
    Systems of head_dim up to 64 are formed and factored. Larger ones, and those with few
    ``iterations``, are solved by conjugate gradients. The gradient is the implicit one:
    it solves a second system of the same accuracy. ``impl="xla"`` has first and second
    derivatives in reverse mode.

    Where a system misses ``tolerance``, an eager call raises ``FloatingPointError``. A
    traced call (under ``jit`` or ``vmap``) yields NaN for that query and head, and its
    gradients are NaN. ``local_linear_residual`` returns the residuals.

    Args:
      map: the pairs.
      ridge: the penalty of ``W``, positive, or the name of an operand ``[num_q_heads]``
        (or with a batch axis in front) of positive floats, which has a gradient. It is
        relative to normalised weights. A ``lambda`` for the raw weights ``w``, as in
        the paper, is the ridge ``lambda * exp(-lse)``, which differs by query.
      tolerance: the greatest ``|q - m - (C + ridge I) x| / |q - m|``.
      iterations: the greatest number of iterations of conjugate gradients; None: as
        many as the tolerance needs, up to ``2 * head_dim``.

    Raises:
      TypeError: the map is not an index map.
      ValueError: the ridge or the tolerance is not positive, or an operand's name is
        not an identifier.

    Example:
      Values that are linear in the keys: a mean falls short, a regression does not.

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> k = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> term = sa.local_linear(sa.causal(), ridge=1e-5)
      >>> for spec in (term.map, term):
      ...     print(sa.attention(k, k, 2 * k, spec, sm_scale=0.1)[0, :, 0, 0].round(2))
      [0.   1.05 2.25 3.61]
      [0. 2. 4. 6.]
    """
    ridge = ridge if isinstance(ridge, str) else float(ridge)
    return LocalLinear(map, ridge, float(tolerance), iterations)
