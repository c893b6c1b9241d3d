"""Norms of the rows that a layer projects: RMS norm, and layer norm with a bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.layers.linear_gates import Parameter, constant


@dataclass(frozen=True)
class RowNorm:
    """A norm over the last axis, by default with a weight for each channel.

    Attributes:
      kind: "rms" (``x / sqrt(mean(x ** 2) + eps)``), or "layer", which has a bias.
      eps: added to the mean square.
      plus_one: whether the factor is 1 plus the weight, which then starts at 0.
      weight: whether there is a weight.
      bias: whether a layer norm has a bias.

    Raises:
      ValueError: ``plus_one`` without a weight.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    plus_one: bool = False
    weight: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        if self.plus_one and not self.weight:
            raise ValueError(
                f"{type(self).__name__}: plus_one=True adds 1 to a weight, but "
                "weight=False has none: leave plus_one=False"
            )

    @property
    def _has_bias(self) -> bool:
        return self.kind == "layer" and self.bias

    def parameters(self, name: str, channels: int) -> dict[str, Parameter]:
        """The weight ``name`` and the bias ``name_bias``, as far as there are any."""
        found = {}
        if self.weight:
            found[name] = constant(0.0 if self.plus_one else 1.0, channels)
        if self._has_bias:
            found[f"{name}_bias"] = constant(0.0, channels)
        return found

    def __call__(
        self, name: str, params: Mapping[str, Array], x: Float[Array, "... channels"]
    ) -> Float[Array, "... channels"]:
        """The norm of ``x``, computed in float32 at least, in the dtype of ``x``."""
        y = widened(x)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = unit_rows(y, self.eps)
        if self.weight:
            weight = _row(params[name], y)
            y = y * (weight + 1 if self.plus_one else weight)
        if self._has_bias:
            y = y + _row(params[f"{name}_bias"], y)
        return y.astype(x.dtype)


def _row(weight: Array, like: Array) -> Array:
    """``weight [channels]`` in the dtype of ``like``, with as many axes."""
    return weight.astype(like.dtype).reshape(*[1] * (like.ndim - 1), -1)


def unit_rows(
    x: Float[Array, "... channels"], eps: float = 1e-6
) -> Float[Array, "... channels"]:
    """Rows divided by the root of their mean square: an RMS norm without a weight.

    Example:
      >>> import jax.numpy as jnp
      >>> unit_rows(jnp.array([3.0, -3.0])).round(3).tolist()
      [1.0, -1.0]
    """
    y = widened(x)
    square = jnp.mean(y * y, axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(square + eps)).astype(x.dtype)
