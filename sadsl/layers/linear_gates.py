"""Gates of a linear layer: how the operands of its spec come from the layer's input.

A gate is a frozen value with two methods: ``parameters(layer)`` says which arrays it
learns, and ``operands(params, x)`` computes operands of the spec from them. ``layer``
is anything with the sizes of ``LinearLayer``. To add a gate, add a class here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.layers.parts import decay_gate, slow_decay, write_strength

Params = Mapping[str, Array]


class Sizes(Protocol):
    """The sizes of a layer on which the shapes of gates depend."""

    @property
    def features(self) -> int:
        """Features of the layer's input."""
        ...

    @property
    def num_heads(self) -> int:
        """Heads of queries and keys."""
        ...

    @property
    def num_v_heads(self) -> int:
        """Heads of values."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        ...


class Parameter(NamedTuple):
    """An array that a layer learns: its shape, and ``start(key, shape, dtype)``."""

    shape: tuple[int, ...]
    start: Callable[..., Array]


def kernel(*shape: int, inputs: int = 1) -> Parameter:
    """A linear map; its first ``inputs`` axes are summed over."""
    axes = tuple(range(len(shape)))
    start = jax.nn.initializers.lecun_normal(axes[:inputs], axes[inputs:])
    return Parameter(shape, start)


def constant(value: float, *shape: int) -> Parameter:
    """An array that starts at one value."""
    return Parameter(shape, jax.nn.initializers.constant(value))


def projected(x: Array, *kernels: Array) -> Array:
    """``x [batch, seq, features]`` through one linear map after the other."""
    for weight in kernels:
        flat = weight.reshape(weight.shape[0], -1).astype(x.dtype)
        x = jnp.matmul(x, flat)
    return x.reshape(*x.shape[:2], *kernels[-1].shape[1:])


def _log_rates(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Logarithms of rates between 1 and 16, as in Mamba-2."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _log_steps(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Inverse softplus of steps from 0.001 to 0.1, even in the logarithm (Mamba-2)."""
    low, high = math.log(0.001), math.log(0.1)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


@dataclass(frozen=True)
class DecayGate:
    """Log-decays "g" of every token by ``decay_gate``, for each value head.

    Attributes:
      by_channel: whether each key channel has its own.
      rank: width of the two linear maps that project them; one full map if None.
      lower: the least log-decay; None for no bound.
    """

    by_channel: bool = False
    rank: int | None = None
    lower: float | None = None

    def parameters(self, layer: Sizes) -> dict[str, Parameter]:
        """The linear maps, ``A_log`` and ``dt_bias``."""
        heads = layer.num_v_heads
        axes = (heads, layer.head_dim) if self.by_channel else (heads,)
        # A bounded gate is flat at a high rate: its rates start at 1.
        bounded = self.lower is not None
        rates = constant(0.0, heads) if bounded else Parameter((heads,), _log_rates)
        return {
            **maps("decay", layer.features, self.rank, axes),
            "A_log": rates,
            "dt_bias": Parameter(axes, _log_steps),
        }

    def operands(self, params: Params, x: Float[Array, "batch seq features"]) -> Params:
        """The operand "g"."""
        made = through("decay", params, x)
        g = decay_gate(made, params["A_log"], params["dt_bias"], self.lower)
        return {"g": g}


@dataclass(frozen=True)
class SlowDecay:
    """Log-decays "g" by key channel: ``log_sigmoid(x W1 W2 + b) / temperature``."""

    rank: int | None = 16
    temperature: float = 16.0

    def parameters(self, layer: Sizes) -> dict[str, Parameter]:
        """The linear maps and a bias."""
        axes = layer.num_heads, layer.head_dim
        found = maps("decay", layer.features, self.rank, axes)
        return {**found, "decay_bias": constant(0.0, *axes)}

    def operands(self, params: Params, x: Float[Array, "batch seq features"]) -> Params:
        """The operand "g"."""
        bias = widened(params["decay_bias"])[None, None]
        made = widened(through("decay", params, x)) + bias
        return {"g": slow_decay(made, self.temperature)}


@dataclass(frozen=True)
class WriteStrength:
    """Operand "beta" of the delta rule, one for each token and value head."""

    negative: bool = False

    def parameters(self, layer: Sizes) -> dict[str, Parameter]:
        """One linear map."""
        return maps("beta", layer.features, None, (layer.num_v_heads,))

    def operands(self, params: Params, x: Float[Array, "batch seq features"]) -> Params:
        """The operand "beta"."""
        made = through("beta", params, x)
        return {"beta": write_strength(made, negative=self.negative)}


Gate = DecayGate | SlowDecay | WriteStrength


def maps(
    name: str, features: int, rank: int | None, axes: tuple[int, ...]
) -> dict[str, Parameter]:
    """The linear map ``name``, or the two of rank ``rank``."""
    if rank is None:
        return {name: kernel(features, *axes)}
    return {f"{name}_in": kernel(features, rank), name: kernel(rank, *axes)}


def through(name: str, params: Params, x: Array) -> Array:
    """``x`` through the linear maps of ``maps``, in the dtype of ``x``."""
    first = params.get(f"{name}_in")
    return projected(x, *([] if first is None else [first]), params[name])
