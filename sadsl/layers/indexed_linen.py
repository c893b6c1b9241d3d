"""Layers with an indexer for Flax Linen: a shell for the arrays of ``IndexedLayer``."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.config import KernelConfig
from sadsl.layers.indexed import IndexedLayer, LayerOutput, Loss
from sadsl.layers.linear import Running
from sadsl.terms.base import Term


class IndexedAttention(linen.Module):
    """Attention to keys that an indexer chooses; ``indexed_models`` describes layers.

    The fields are the arguments of ``sadsl.layers.nnx.IndexedAttention``. ``attend``
    goes through ``apply(variables, x, method="attend")``.

    Example:
      >>> import jax
      >>> from sadsl.layers import indexed_models
      >>> from sadsl.layers.linen import IndexedAttention
      >>> layer = indexed_models.minimax_m3(8, 4, 2, head_dim=4, turned=2, index_dim=4)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> model = IndexedAttention(layer)
      >>> y, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
      >>> y.shape, variables["params"]["index_key"].shape
      ((1, 6, 8), (8, 4))
    """

    description: IndexedLayer
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    impl: str | None = None
    interpret: Any = False
    config: KernelConfig | None = None

    @property
    def spec(self) -> Term:
        """The spec of the layer."""
        return self.description.term

    def __call__(
        self,
        x: Float[Array, "batch seq features"],
        *,
        choices: Mapping[str, Array] | None = None,
    ) -> Float[Array, "batch seq out_features"]:
        """The outputs; ``choices`` of earlier layers if the spec reuses one."""
        return self.attend(x, choices=choices).out

    @linen.compact
    def attend(
        self,
        x: Float[Array, "batch seq features"],
        *,
        choices: Mapping[str, Array] | None = None,
        return_choices: bool = False,
        loss: Loss | None = None,
    ) -> LayerOutput:
        """The outputs, and the choice and the loss if asked for; see ``IndexedLayer``.

        Args:
          x: the inputs.
          choices: choices of earlier layers, if the spec reuses one.
          return_choices: whether to return the choice that this layer makes.
          loss: "dense" or "sparse": the loss of the indexer.
        """
        params = {
            name: self.param(name, start, shape, self.param_dtype)
            for name, (shape, start) in self.description.parameters().items()
        }
        running = Running(self.dtype, self.impl, self.interpret, self.config)
        return self.description(
            params, x, choices=choices, return_choices=return_choices, loss=loss,
            running=running,
        )  # fmt: skip
