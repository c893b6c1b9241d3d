"""The linear layers for Flax NNX: shells that hold the arrays of a ``LinearLayer``."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.layers import linear_models
from sadsl.layers.linear import LinearLayer, LinearLayerState, Running
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.terms.recurrent import Recurrent


class RecurrentLayer(nnx.Module):
    """A linear layer; each class names the function that describes it.

    Args:
      features: features of ``x``.
      num_heads: heads of queries and keys.
      options: those of the function that describes the layer.
      dtype: of the computation; promoted from input and parameters if None.
      param_dtype: of the parameters.
      impl, interpret, config: as in ``sadsl.attention``.
      rngs: where ``rngs.params`` comes from.
    """

    describe: ClassVar[Callable[..., LinearLayer]]

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        impl: str | None = None,
        interpret: Any = False,
        config: KernelConfig | None = None,
        mesh_axes: MeshAxes | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """Makes the parameters; the class lists the arguments."""
        self.description = type(self).describe(features, num_heads, **options)
        self.running = Running(dtype, impl, interpret, config, mesh_axes)
        for name, (shape, start) in self.description.parameters().items():
            setattr(self, name, nnx.Param(start(rngs.params(), shape, param_dtype)))

    @property
    def spec(self) -> Recurrent:
        """The spec of the recurrence."""
        return self.description.spec

    def __call__(
        self,
        x: Float[Array, "batch seq features"],
        *,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        state: LinearLayerState | None = None,
        return_state: bool = False,
    ) -> Any:
        """The outputs ``[batch, seq, out_features]``, and the state if asked for."""
        names = self.description.parameters()
        params = {name: getattr(self, name)[...] for name in names}
        return self.description(
            params, x, segment_ids=segment_ids, state=state,
            return_state=return_state, running=self.running,
        )  # fmt: skip

    def init_state(self, batch: int) -> LinearLayerState:
        """The state before the first token."""
        return self.description.init_state(batch, self.running.dtype or jnp.float32)

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


class LinearAttention(RecurrentLayer):
    """Linear attention with a normaliser; ``linear_models.linear_attention``.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import LinearAttention
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> model = lambda x: LinearAttention(8, 2, rngs=nnx.Rngs(0))(x)
      >>> jax.eval_shape(model, x).shape
      (1, 6, 8)
    """

    describe = staticmethod(linear_models.linear_attention)


class GatedLinearAttention(RecurrentLayer):
    """Gated linear attention; ``linear_models.gated_linear_attention``.

    Example:
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import GatedLinearAttention
      >>> make = lambda: GatedLinearAttention(8, 2, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(make).spec.decay
      'g'
    """

    describe = staticmethod(linear_models.gated_linear_attention)


class DeltaNet(RecurrentLayer):
    """DeltaNet; ``linear_models.delta_net``.

    Example:
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import DeltaNet
      >>> nnx.eval_shape(lambda: DeltaNet(8, 2, rngs=nnx.Rngs(0))).spec
      delta()
    """

    describe = staticmethod(linear_models.delta_net)


class GatedDeltaNet(RecurrentLayer):
    """Gated DeltaNet; ``linear_models.gated_delta_net``.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import GatedDeltaNet
      >>> def decode(x):  # [batch, seq, features]
      ...     layer = GatedDeltaNet(8, 2, num_v_heads=4, rngs=nnx.Rngs(0))
      ...     y, state = layer(x, return_state=True)
      ...     return layer.step(state, x[:, -1])
      >>> state, y = jax.eval_shape(decode, jax.ShapeDtypeStruct((1, 6, 8), "float32"))
      >>> state.inner.s.shape, state.conv.shape, y.shape
      ((1, 4, 4, 4), (1, 3, 32), (1, 8))
    """

    describe = staticmethod(linear_models.gated_delta_net)


class KimiDelta(RecurrentLayer):
    """Kimi delta attention; ``linear_models.kimi_delta``.

    Example:
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import KimiDelta
      >>> make = lambda: KimiDelta(8, 2, lower=-5.0, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(make).spec.by
      'channel'
    """

    describe = staticmethod(linear_models.kimi_delta)


class LightNet(RecurrentLayer):
    """LightNet; ``linear_models.light_net``.

    Example:
      >>> import sadsl as sa
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import LightNet
      >>> make = lambda: LightNet(8, 2, map=sa.full(), rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(make).spec.map
      full()
    """

    describe = staticmethod(linear_models.light_net)
