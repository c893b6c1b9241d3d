"""Sparse attention as a layer of Flax NNX."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.config import KernelConfig
from sadsl.layers.heads import head_sizes
from sadsl.layers.indexed_nnx import IndexedAttention as IndexedAttention
from sadsl.layers.linear_nnx import DeltaNet as DeltaNet
from sadsl.layers.linear_nnx import GatedDeltaNet as GatedDeltaNet
from sadsl.layers.linear_nnx import GatedLinearAttention as GatedLinearAttention
from sadsl.layers.linear_nnx import KimiDelta as KimiDelta
from sadsl.layers.linear_nnx import LightNet as LightNet
from sadsl.layers.linear_nnx import LinearAttention as LinearAttention
from sadsl.layers.nnx_parts import Centroids as Centroids
from sadsl.layers.nnx_parts import CommitmentLoss as CommitmentLoss
from sadsl.layers.nnx_parts import commitment_loss as commitment_loss
from sadsl.layers.routing import Routing
from sadsl.layers.sparse_nnx import DEFAULT_KERNEL_INIT
from sadsl.layers.sparse_nnx import SparseAttention as SparseAttention
from sadsl.layers.state import ClusterState, initial, lloyd
from sadsl.run.call import attention
from sadsl.selections.kmeans import normalized

POSITION_INIT = nnx.initializers.normal(0.02)


class BlockCompressor(nnx.Module):
    """Compresses a block of keys or values to one vector, by a small network.

    Use it as ``modules={"keys": BlockCompressor(...)}`` of a ``SparseAttention`` whose
    spec has ``compressed(length, key="keys")``. A learned vector is added for each
    place of a block, then a network of one hidden layer takes the whole block. All
    heads share it (Yuan et al., Native sparse attention, 2025, section 3.3.1).

    Args:
      length: positions in a block; that of the spec.
      head_dim: features of a key or value.
      hidden: width of the hidden layer; ``2 * head_dim`` if None.
      dtype, param_dtype: of the computation and of the parameters.
      rngs: where ``rngs.params`` comes from.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import BlockCompressor
      >>> compress = lambda blocks: BlockCompressor(4, 8, rngs=nnx.Rngs(0))(blocks)
      >>> blocks = jax.ShapeDtypeStruct((1, 3, 4, 2, 8), "float32")
      >>> jax.eval_shape(compress, blocks).shape
      (1, 3, 2, 8)
    """

    def __init__(
        self,
        length: int,
        head_dim: int,
        *,
        hidden: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters; the class lists the arguments."""
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        hidden = 2 * head_dim if hidden is None else hidden
        start = POSITION_INIT(rngs.params(), (length, head_dim), param_dtype)
        self.positions = nnx.Param(start)
        self.wide = linear(length * head_dim, hidden)
        self.narrow = linear(hidden, head_dim)

    def __call__(
        self, blocks: Float[Array, "batch blocks length heads head_dim"]
    ) -> Float[Array, "batch blocks heads head_dim"]:
        """One vector for each block and head."""
        positions = self.positions[...].astype(blocks.dtype)
        placed = jnp.swapaxes(blocks, 2, 3) + positions[None, None, None]
        flat = placed.reshape(*placed.shape[:3], -1)
        return self.narrow(jax.nn.gelu(self.wide(flat)))


class RoutingAttention(nnx.Module):
    """Routing attention: some heads are local, the others cluster tokens; causal.

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4. The centroids are ``Centroids`` variables, not parameters. In
    training each call moves them and sets ``commitment_loss``, which you add to the
    loss::

        def loss(model, x, y):
            return cross_entropy(model(x), y) + commitment_loss(model)

    ``model.eval()`` leaves them as they are, as it does for ``nnx.BatchNorm``.
    Parameters: ``query``, ``value``, ``out``, and ``key`` for the heads whose keys are
    not their queries (all heads if not ``routing.share_qk``, else the local ones).

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import RoutingAttention
      >>> from sadsl.layers.routing import Routing
      >>> def model(x):
      ...     routing = Routing(num_clusters=2, window=4, local_window=4)
      ...     return RoutingAttention(2, 8, routing=routing, rngs=nnx.Rngs(0))(x)
      >>> x = jax.ShapeDtypeStruct((1, 8, 8), "float32")  # [batch, seq, in_features]
      >>> jax.eval_shape(model, x).shape
      (1, 8, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        routing: Routing | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = DEFAULT_KERNEL_INIT,
        transform_qk: Callable[[Array, Array], tuple[Array, Array]] | None = None,
        impl: str | None = None,
        config: KernelConfig | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters and the centroids.

        Args:
          num_heads, in_features, head_dim, out_features, use_bias, dtype, param_dtype,
            kernel_init, impl, config: as in ``SparseAttention``.
          routing: clusters and how they are learned; those of WikiText-103 if None.
          transform_qk: function of the queries and keys of the local heads, such as
            rotary positions; clustered heads have none.
          rngs: where ``rngs.params`` comes from, for parameters and centroids.

        Raises:
          ValueError: the sizes do not divide, or no head is left to be clustered.
        """
        self.routing = Routing() if routing is None else routing
        _, _, dim = head_sizes(in_features, num_heads, None, head_dim)
        self.num_local = self.routing.num_local_of(num_heads)
        self.term = self.routing.spec(num_heads)
        self.transform_qk = transform_qk
        self.impl, self.config = impl, config
        linear = partial(
            nnx.LinearGeneral, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
            kernel_init=kernel_init, rngs=rngs,
        )  # fmt: skip
        self.query = linear(in_features, (num_heads, dim))
        keys = self.num_local if self.routing.share_qk else num_heads
        self.key = linear(in_features, (keys, dim)) if keys else None
        self.value = linear(in_features, (num_heads, dim))
        out_features = in_features if out_features is None else out_features
        self.out = linear((num_heads, dim), out_features, axis=(-2, -1))
        clusters = num_heads - self.num_local, self.routing.num_clusters, dim
        start = initial(rngs.params(), *clusters, norm=self.routing.norm)
        self.centroids = Centroids(start.means)
        self.counts, self.sums = Centroids(start.counts), Centroids(start.sums)
        self.commitment_loss = CommitmentLoss(jnp.zeros((), jnp.float32))
        # nnx.Module.train() and .eval() set the attribute of this name.
        self.use_running_average = False

    def __call__(
        self,
        x: Float[Array, "batch seq in_features"],
        *,
        use_running_average: bool | None = None,
    ) -> Float[Array, "batch seq out_features"]:
        """Attends within ``x``; ``use_running_average=True`` keeps the centroids."""
        q, v = self.query(x), self.value(x)
        k = None if self.key is None else self.key(x)
        q, k, routed = self.routing.attended(q, k, self.transform_qk)
        out = attention(
            q, k, v, self.term, operands={"centroids": self.centroids[...]},
            impl=self.impl, config=self.config,
        )  # fmt: skip
        asked = use_running_average
        if not (self.use_running_average if asked is None else asked):
            state = ClusterState(self.centroids[...], self.counts[...], self.sums[...])
            moved, self.commitment_loss[...] = self.routing.learned(state, routed)
            self.centroids[...], self.counts[...], self.sums[...] = moved
        return self.out(cast(Array, out))

    def start_from(self, x: Float[Array, "batch seq in_features"], key: Array) -> None:
        """Fits the centroids to a first batch, by ``sadsl.layers.state.lloyd``."""
        q = self.query(x)[:, :, self.num_local :]
        vectors = normalized(jnp.swapaxes(q, 1, 2), "unit")
        options = self.routing.num_clusters, 10, self.routing.axis_name
        found = lloyd(key, vectors, *options)
        self.centroids[...], self.counts[...], self.sums[...] = found
