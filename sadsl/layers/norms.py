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
    """A norm over the last axis, with a weight for each channel.

    Attributes:
      kind: "rms" (``x / sqrt(mean(x ** 2) + eps)``), or "layer", which has a bias.
      eps: added to the mean square.
      plus_one: whether the factor is 1 plus the weight, which then starts at 0.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    plus_one: bool = False

    def parameters(self, name: str, channels: int) -> dict[str, Parameter]:
        """The weight ``name``, and the bias ``name_bias`` of a layer norm."""
        found = {name: constant(0.0 if self.plus_one else 1.0, channels)}
        if self.kind == "layer":
            found[f"{name}_bias"] = constant(0.0, channels)
        return found

    def __call__(
        self, name: str, params: Mapping[str, Array], x: Float[Array, "... channels"]
    ) -> Float[Array, "... channels"]:
        """The norm of ``x``, computed in float32 at least, in the dtype of ``x``."""
        y = widened(x)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        weight = params[name].astype(y.dtype).reshape(*[1] * (x.ndim - 1), -1)
        y = unit_rows(y, self.eps) * (weight + 1 if self.plus_one else weight)
        if self.kind == "layer":
            y = y + params[f"{name}_bias"].astype(y.dtype).reshape(weight.shape)
        return y.astype(x.dtype)


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
