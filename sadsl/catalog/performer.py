"""Performer: linear attention whose random features estimate a softmax."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.maps.base import IndexMap, at_least
from sadsl.terms.linear import Linear, linear


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FavorFeatures:
    """A feature map; see ``favor_features``. A pytree: it may be an argument of a jit.

    Attributes:
      weights: ``[num_features, head_dim]``.
    """

    weights: Float[Array, "num_features head_dim"]

    def __call__(self, x: Float[Array, "*lead head_dim"]) -> Array:
        """Positive features ``[*lead, num_features]`` of ``x``."""
        count, dim = self.weights.shape
        x = x * dim**-0.25
        inner = jnp.einsum("...d,fd->...f", x, self.weights, precision="highest")
        size = 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)
        return jnp.exp(inner - size) * count**-0.5


def favor_features(
    key: Array, head_dim: int, num_features: int = 256, *, orthogonal: bool = True
) -> FavorFeatures:
    """Draws positive random features (FAVOR+) that estimate ``exp(q . k / sqrt(d))``.

    Features are ``exp(w . x - |x|^2 / 2) / sqrt(num_features)`` with ``x`` divided by
    ``head_dim ** 0.25`` and normal ``w``. The exponent is at most ``|w|^2 / 2``, about
    ``head_dim / 2``. Draw anew with another key during training (Choromanski et al.,
    Rethinking attention with Performers, 2021, sections 2.3 and 2.4).

    Args:
      key: a key of ``jax.random``.
      head_dim: the size of queries and keys.
      num_features: how many; the error falls as its root.
      orthogonal: whether each ``head_dim`` of them are orthogonal, which lowers the
        variance.

    Returns:
      A function, to be passed as ``operands={"phi": features}``.

    Raises:
      ValueError: a size is below 1.

    Example:
      >>> import jax
      >>> from sadsl import catalog
      >>> phi = catalog.favor_features(jax.random.key(0), head_dim=4, num_features=8)
      >>> phi(jax.numpy.ones((2, 4))).shape
      (2, 8)
    """
    at_least("favor_features", "head_dim", head_dim, 1)
    at_least("favor_features", "num_features", num_features, 1)
    of_rows, of_norms = jax.random.split(key)
    blocks = -(-num_features // head_dim)
    weights = jax.random.normal(of_rows, (blocks, head_dim, head_dim))
    if not orthogonal:
        return FavorFeatures(weights.reshape(-1, head_dim)[:num_features])
    q, r = jnp.linalg.qr(weights)
    # With the signs of r, q is uniform among orthogonal matrices.
    signs = jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))
    rows = (q * signs[:, None]).swapaxes(1, 2).reshape(-1, head_dim)
    # Rows as long as those of independent normal numbers.
    norms = jnp.linalg.norm(jax.random.normal(of_norms, rows.shape), axis=1)
    return FavorFeatures((norms[:, None] * rows)[:num_features])


def performer(map: IndexMap | None = None) -> Linear:
    """Linear attention with a feature map "phi" of the call: ``favor_features(...)``.

    Choromanski et al., Rethinking attention with Performers, 2021, section 2.

    Args:
      map: as in ``sadsl.linear``.

    Example:
      >>> from sadsl import catalog
      >>> catalog.performer()
      linear('phi')
    """
    return linear("phi", map=map)
