"""Feature maps of linear attention: functions of q and k, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sadsl.maps.base import at_least
from sadsl.maps.call_text import call_text

FeatureMap: TypeAlias = Callable[..., Array]


def elu1(x: Array) -> Array:
    """``elu(x) + 1``: positive everywhere, without cancellation far below 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    return jnp.maximum(x, 0)


def identity(x: Array) -> Array:
    """``x`` unchanged."""
    return x


def softmax(x: Array) -> Array:
    """The softmax of ``x`` over its channels."""
    return jax.nn.softmax(x, axis=-1)


def taylor(x: Array) -> Array:
    """Features whose products are ``1 + s + s ** 2 / 2`` with ``s = q . k``.

    ``1 + d + d ** 2`` features of ``d`` channels (Arora et al., Simple linear attention
    language models balance the recall-throughput tradeoff, 2024, section 4.1).
    """
    one = jnp.ones_like(x[..., :1])
    return jnp.concatenate([one, x, square(x) * np.sqrt(0.5)], axis=-1)


def square(x: Array) -> Array:
    """Features whose products are ``(q . k) ** 2``: all products of two channels."""
    return (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)


FEATURES: Mapping[str, FeatureMap] = {
    "elu1": elu1,
    "relu": relu,
    "identity": identity,
    "exp": jnp.exp,
    "softmax": softmax,
    "taylor": taylor,
    "square": square,
}
# With the others a weight may be negative, and then the normaliser has no logarithm.
POSITIVE_WEIGHTS = "elu1", "relu", "exp", "softmax", "taylor", "square"


@dataclass(frozen=True, repr=False)
class CosformerFeatures:
    """The feature map of cosFormer; see ``cosformer_features``."""

    length: int

    # The features of a token depend on its position: phi(x, positions).
    positional = True

    def __post_init__(self) -> None:
        at_least("cosformer_features", "length", self.length, 1)

    def __call__(self, x: Array, positions: Array) -> Array:
        """Features ``[..., seq, heads, 2 dim]`` of ``x`` at ``positions [seq]``."""
        angle = (0.5 * np.pi / self.length) * positions.astype(x.dtype)
        angle = angle[..., None, None]
        x = jnp.maximum(x, 0)
        return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)

    def __repr__(self) -> str:
        return call_text(self)


def cosformer_features(length: int) -> CosformerFeatures:
    """The feature map with weights ``relu(q) . relu(k) cos(pi (i - j) / (2 length))``.

    Qin et al., cosFormer: Rethinking softmax in attention, 2022, section 3.2.

    Args:
      length: at least the greatest distance between a query and a key plus 1. Farther
        keys have negative weights.

    Raises:
      ValueError: the length is below 1.

    Example:
      >>> import sadsl as sa
      >>> sa.linear(sa.cosformer_features(4096))
      linear(cosformer_features(4096))
    """
    return CosformerFeatures(length)
