"""The linear layers for Flax Linen: shells that hold the arrays of a ``LinearLayer``.

Fields are the options of the functions of ``linear_models``, and those of ``Running``;
the features are read off the input. ``init_state`` and ``step`` go through ``apply``::

    state = layer.init_state(batch, features)
    state, y = layer.apply(variables, state, x, method="step")
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.layers import linear_models
from sadsl.layers.linear import LinearLayer, LinearLayerState, Running
from sadsl.layers.parts import Activation
from sadsl.maps.base import IndexMap
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.terms.features import FeatureMap
from sadsl.terms.recurrent import Recurrent


class RecurrentLayer(linen.Module):
    """A linear layer; each class names the function that describes it."""

    num_heads: int
    head_dim: int | None = None
    head_dim_v: int | None = None
    map: IndexMap | None = None
    out_features: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    impl: str | None = None
    interpret: Any = False
    config: KernelConfig | None = None
    mesh_axes: MeshAxes | None = None

    describe: ClassVar[Callable[..., LinearLayer]]

    def description(self, features: int) -> LinearLayer:
        """The layer for inputs of ``features`` features."""
        own = {f.name for f in fields(type(self)) if f.name not in NOT_OPTIONS}
        options = {name: getattr(self, name) for name in own}
        return type(self).describe(features, self.num_heads, **options)

    @property
    def spec(self) -> Recurrent:
        """The spec of the recurrence."""
        # It does not depend on the features.
        return self.description(self.num_heads).spec

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "batch seq features"],
        *,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        state: LinearLayerState | None = None,
        return_state: bool = False,
    ) -> Any:
        """The outputs ``[batch, seq, out_features]``, and the state if asked for."""
        layer = self.description(x.shape[-1])
        params = {
            name: self.param(name, start, shape, self.param_dtype)
            for name, (shape, start) in layer.parameters().items()
        }
        running = Running(
            self.dtype, self.impl, self.interpret, self.config, self.mesh_axes
        )
        return layer(
            params, x, segment_ids=segment_ids, state=state,
            return_state=return_state, running=running,
        )  # fmt: skip

    def init_state(self, batch: int, features: int) -> LinearLayerState:
        """The state before the first token, for inputs of ``features`` features."""
        layer = self.description(features)
        return layer.init_state(batch, self.dtype or jnp.float32)

    def step(
        self,
        state: LinearLayerState,
        x: Float[Array, "batch features"],
        *,
        segment_ids: Integer[Array, " batch"] | None = None,
    ) -> tuple[LinearLayerState, Array]:
        """Adds one token, and returns the new state and the token's output."""
        ids = None if segment_ids is None else segment_ids[:, None]
        y, state = self(x[:, None], segment_ids=ids, state=state, return_state=True)
        return state, y[:, 0]


# Fields that are no options of the functions that describe layers.
NOT_OPTIONS = (
    "num_heads", "dtype", "param_dtype", "impl", "interpret", "config", "parent",
    "name", "mesh_axes",
)  # fmt: skip


class LinearAttention(RecurrentLayer):
    """Linear attention with a normaliser; ``linear_models.linear_attention``.

    Example:
      >>> import jax
      >>> from sadsl.layers.linen import LinearAttention
      >>> layer = LinearAttention(2, feature_map="relu")
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
      >>> y.shape, variables["params"]["key"].shape
      ((1, 6, 8), (8, 2, 4))
    """

    feature_map: str | FeatureMap = "elu1"
    conv: int | None = None

    describe = staticmethod(linear_models.linear_attention)


class GatedLinearAttention(RecurrentLayer):
    """Gated linear attention; ``linear_models.gated_linear_attention``.

    Example:
      >>> from sadsl.layers.linen import GatedLinearAttention
      >>> GatedLinearAttention(2).spec.by
      'channel'
    """

    decay_rank: int | None = 16
    temperature: float = 16.0
    gate: Activation | None = "silu"
    norm_eps: float = 1e-5
    conv: int | None = None

    describe = staticmethod(linear_models.gated_linear_attention)


class DeltaNet(RecurrentLayer):
    """DeltaNet; ``linear_models.delta_net``.

    Example:
      >>> from sadsl.layers.linen import DeltaNet
      >>> DeltaNet(2).spec
      delta()
    """

    negative: bool = False
    gate: Activation | None = None
    norm_eps: float = 1e-5
    conv: int | None = 4

    describe = staticmethod(linear_models.delta_net)


class GatedDeltaNet(RecurrentLayer):
    """Gated DeltaNet; ``linear_models.gated_delta_net``.

    Example:
      >>> import jax
      >>> from sadsl.layers.linen import GatedDeltaNet
      >>> layer = GatedDeltaNet(2, num_v_heads=4)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> variables = jax.eval_shape(layer.init, jax.random.key(0), x)
      >>> variables["params"]["conv"].shape, variables["params"]["out"].shape
      ((32, 4), (4, 4, 8))
      >>> layer.init_state(1, 8).conv.shape
      (1, 3, 32)
    """

    num_v_heads: int | None = None
    negative: bool = False
    gate: Activation | None = "silu"
    norm_eps: float = 1e-6
    conv: int | None = 4

    describe = staticmethod(linear_models.gated_delta_net)


class KimiDelta(RecurrentLayer):
    """Kimi delta attention; ``linear_models.kimi_delta``.

    Example:
      >>> from sadsl.layers.linen import KimiDelta
      >>> KimiDelta(2).spec
      delta(decay='g', by='channel')
    """

    num_v_heads: int | None = None
    low_rank: bool = True
    lower: float | None = None
    gate: Activation | None = "sigmoid"
    norm_eps: float = 1e-5
    conv: int | None = 4

    describe = staticmethod(linear_models.kimi_delta)


class LightNet(RecurrentLayer):
    """LightNet; ``linear_models.light_net``.

    Example:
      >>> import sadsl as sa
      >>> from sadsl.layers.linen import LightNet
      >>> LightNet(2, map=sa.full()).spec.map
      full()
    """

    gate_rank: int | None = 128
    norm_eps: float = 1e-5
    conv: int | None = None

    describe = staticmethod(linear_models.light_net)
