"""Rotary positions, of some channels of a head, in the two layouts in use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import widened
from sadsl.layers.linear_gates import Parameter, constant
from sadsl.layers.rotary_scaling import Scaling, rates_of

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
      scaling: of the frequencies, for long contexts; None for none.

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
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            raise ValueError(
                f"Rotary: channels={self.channels} must be even and at least 2: they "
                "turn in pairs"
            )
        self.rates()

    def rates(self) -> np.ndarray:
        """The angle of each pair in one position, without what is learned."""
        if self.scaling is None:
            return rates_of(self.theta, self.channels)
        return self.scaling.rates(self.theta, self.channels)

    def parameters(self) -> dict[str, Parameter]:
        """The learned factors, if any."""
        if not self.learned:
            return {}
        return {STRETCH: constant(0.0, self.channels // 2)}

    def __call__(
        self,
        x: Float[Array, "batch seq *heads dim"],
        position: Int[Array, "*batch seq"] | Float[Array, "*batch seq"],
        params: Mapping[str, Array],
        *,
        back: bool = False,
    ) -> Float[Array, "batch seq *heads dim"]:
        """``x`` turned, or turned back: the inverse.

        ``position`` is ``[seq]``, or ``[batch or 1, seq]``.

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
        rate = jnp.asarray(self.rates(), turned.dtype)
        if self.learned:
            rate = rate * jnp.exp(params[STRETCH].astype(turned.dtype))
        angle = position.astype(turned.dtype)[..., None] * rate[*[None] * position.ndim]
        batch = position.shape[0] if position.ndim > 1 else 1
        angle = angle.reshape(batch, -1, *[1] * (x.ndim - 3), pairs)
        cos, sin = jnp.cos(angle), jnp.sin(-angle if back else angle)
        if self.scaling is not None:
            magnitude = self.scaling.magnitude
            grown = 1 / magnitude if back else magnitude
            cos, sin = cos * grown, sin * grown
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


def document_positions(segment_ids: Any) -> Int[Array, "*batch seq"]:
    """Positions within each document: they restart where the segment id changes.

    Example:
      >>> import numpy as np
      >>> document_positions(np.array([[7, 7, 7, 2, 2]])).tolist()
      [[0, 1, 2, 0, 1]]
    """
    changes = jnp.asarray(segment_ids[..., 1:] != segment_ids[..., :-1])
    begins = jnp.pad(changes, [(0, 0)] * (changes.ndim - 1) + [(1, 0)])
    axis = begins.ndim - 1
    at = jax.lax.broadcasted_iota(jnp.int32, begins.shape, axis)
    return at - jax.lax.cummax(jnp.where(begins, at, 0), axis=axis)
