"""Rotary positions, of some channels of a head, in the two layouts in use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import widened
from sadsl.layers.linear_gates import Parameter, constant

STRETCH = "rotary_stretch"


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of channels by angles that grow with the position.

    Su et al., RoFormer, 2021, section 3.4. Pair ``i`` turns by the angle ``position *
    theta ** (-2 * i / channels)``.

    Attributes:
      channels: how many channels of a head turn, an even number.
      layout: a pair is channel ``i`` and ``i + channels / 2`` ("half"), or neighbours
        ("interleaved").
      side: whether the first or the last channels of a head turn.
      theta: see above.
      learned: whether the logarithm of a factor of each frequency is learned, the
        parameter "rotary_stretch".

    Raises:
      ValueError: ``channels`` is odd or below 2.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 0.0, 5.0]).reshape(1, 1, 1, 3)
      >>> quarter = jnp.array([3.14159265 / 2])
      >>> Rotary(2)(x, quarter, {})[0, 0, 0].round(3).tolist()
      [-0.0, 1.0, 5.0]
    """

    channels: int
    layout: Literal["half", "interleaved"] = "half"
    side: Literal["first", "last"] = "first"
    theta: float = 10000.0
    learned: bool = False

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            raise ValueError(
                f"Rotary: channels={self.channels} must be even and at least 2: they "
                "turn in pairs"
            )

    def parameters(self) -> dict[str, Parameter]:
        """The learned factors, if any."""
        if not self.learned:
            return {}
        return {STRETCH: constant(0.0, self.channels // 2)}

    def __call__(
        self,
        x: Float[Array, "batch seq *heads dim"],
        position: Int[Array, " seq"] | Float[Array, " seq"],
        params: Mapping[str, Array],
        *,
        back: bool = False,
    ) -> Float[Array, "batch seq *heads dim"]:
        """``x`` turned, or turned back.

        Raises:
          ValueError: ``x`` has fewer channels than turn.
        """
        dim, pairs = x.shape[-1], self.channels // 2
        if dim < self.channels:
            raise ValueError(
                f"Rotary: x has {dim} channels, but {self.channels} turn: turn fewer, "
                "or make heads wider"
            )
        first = 0 if self.side == "first" else dim - self.channels
        turned = widened(x[..., first : first + self.channels])
        rate = self.theta ** (-jnp.arange(pairs, dtype=turned.dtype) / pairs)
        if self.learned:
            rate = rate * jnp.exp(params[STRETCH].astype(turned.dtype))
        angle = position.astype(turned.dtype)[:, None] * rate[None]
        angle = angle.reshape(1, -1, *[1] * (x.ndim - 3), pairs)
        cos, sin = jnp.cos(angle), jnp.sin(-angle if back else angle)
        shape = (*x.shape[:-1], *self._pair_axes(pairs))
        a, b = jnp.moveaxis(turned.reshape(shape), self._axis, 0)
        both = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=self._axis)
        both = both.reshape(turned.shape).astype(x.dtype)
        rest = x[..., :first], x[..., first + self.channels :]
        return jnp.concatenate([rest[0], both, rest[1]], axis=-1)

    @property
    def _axis(self) -> int:
        """The axis of the two channels of a pair, after reshaping."""
        return -2 if self.layout == "half" else -1

    def _pair_axes(self, pairs: int) -> tuple[int, int]:
        return (2, pairs) if self.layout == "half" else (pairs, 2)
