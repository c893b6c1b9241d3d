"""Layers with an indexer for Flax NNX: a shell for the arrays of ``IndexedLayer``."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.config import KernelConfig
from sadsl.layers.indexed import IndexedLayer, LayerOutput, Loss
from sadsl.layers.linear import Running
from sadsl.terms.base import Term


class IndexedAttention(nnx.Module):
    """Attention to keys that an indexer chooses; ``indexed_models`` describes layers.

    Args:
      description: the layer.
      dtype: of the computation; promoted from input and parameters if None.
      param_dtype: of the parameters.
      impl, interpret, config: as in ``sadsl.attention``.
      rngs: where ``rngs.params`` comes from.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers import indexed_models
      >>> from sadsl.layers.nnx import IndexedAttention
      >>> layer = indexed_models.minimax_m3(8, 4, 2, head_dim=4, turned=2, index_dim=4)
      >>> def loss(x):  # [batch, seq, features]
      ...     model = IndexedAttention(layer, rngs=nnx.Rngs(0))
      ...     out, _, of_indexer = model.attend(x, loss="sparse")
      ...     return out.mean() + of_indexer
      >>> jax.eval_shape(loss, jax.ShapeDtypeStruct((1, 6, 8), "float32")).shape
      ()
    """

    def __init__(
        self,
        description: IndexedLayer,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        impl: str | None = None,
        interpret: Any = False,
        config: KernelConfig | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters; the class lists the arguments."""
        self.description = description
        self.running = Running(dtype, impl, interpret, config)
        for name, (shape, start) in description.parameters().items():
            setattr(self, name, nnx.Param(start(rngs.params(), shape, param_dtype)))

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
        names = self.description.parameters()
        params = {name: getattr(self, name)[...] for name in names}
        return self.description(
            params, x, choices=choices, return_choices=return_choices, loss=loss,
            running=self.running,
        )  # fmt: skip
