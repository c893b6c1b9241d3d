"""Sparse attention as a layer of Flax Linen."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.config import KernelConfig
from sadsl.layers.heads import head_sizes
from sadsl.layers.indexed_linen import IndexedAttention as IndexedAttention
from sadsl.layers.linear_linen import DeltaNet as DeltaNet
from sadsl.layers.linear_linen import GatedDeltaNet as GatedDeltaNet
from sadsl.layers.linear_linen import GatedLinearAttention as GatedLinearAttention
from sadsl.layers.linear_linen import KimiDelta as KimiDelta
from sadsl.layers.linear_linen import LightNet as LightNet
from sadsl.layers.linear_linen import LinearAttention as LinearAttention
from sadsl.layers.routing import Routing
from sadsl.layers.sparse_linen import SparseAttention as SparseAttention
from sadsl.layers.state import ClusterState, initial
from sadsl.run.call import attention


class BlockCompressor(linen.Module):
    """Compresses a block of keys or values to one vector, by a small network.

    Fields and mathematics are those of ``sadsl.layers.nnx.BlockCompressor``; sizes are
    read off the blocks.

    Example:
      >>> import jax
      >>> from sadsl.layers.linen import BlockCompressor
      >>> blocks = jax.ShapeDtypeStruct((1, 3, 4, 2, 8), "float32")
      >>> init = BlockCompressor().init_with_output
      >>> jax.eval_shape(init, jax.random.key(0), blocks)[0].shape
      (1, 3, 2, 8)
    """

    hidden: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @linen.compact
    def __call__(
        self, blocks: Float[Array, "batch blocks length heads head_dim"]
    ) -> Float[Array, "batch blocks heads head_dim"]:
        """One vector for each block and head."""
        length, dim = blocks.shape[2], blocks.shape[4]
        linear = partial(linen.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        start = linen.initializers.normal(0.02)
        positions = self.param("positions", start, (length, dim), self.param_dtype)
        placed = jnp.swapaxes(blocks, 2, 3)
        placed = placed + positions.astype(blocks.dtype)[None, None, None]
        flat = placed.reshape(*placed.shape[:3], -1)
        hidden = 2 * dim if self.hidden is None else self.hidden
        wide = linen.gelu(linear(hidden, name="wide")(flat))
        return linear(dim, name="narrow")(wide)


class RoutingAttention(linen.Module):
    """Routing attention: some heads are local, the others cluster tokens; causal.

    The fields are those of ``sadsl.layers.nnx.RoutingAttention``. The centroids are in
    the collection ``routing`` (``centroids``, ``counts``, ``sums``), which must be
    mutable in training. The commitment loss is sown as ``losses/commitment``, f32::

        y, state = layer.apply(variables, x, train=True, mutable=["routing", "losses"])

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4.

    Example:
      >>> import jax
      >>> from sadsl.layers.linen import RoutingAttention
      >>> from sadsl.layers.routing import Routing
      >>> layer = RoutingAttention(2, Routing(num_clusters=2, window=4, local_window=4))
      >>> x = jax.ShapeDtypeStruct((1, 8, 8), "float32")  # [batch, seq, in_features]
      >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
      >>> y.shape, variables["routing"]["centroids"].shape
      ((1, 8, 8), (1, 2, 4))
    """

    num_heads: int
    routing: Routing = Routing()
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = linen.initializers.lecun_normal()
    transform_qk: Callable[[Array, Array], tuple[Array, Array]] | None = None
    impl: str | None = None
    config: KernelConfig | None = None

    @linen.compact
    def __call__(
        self, x: Float[Array, "batch seq in_features"], *, train: bool = False
    ) -> Float[Array, "batch seq out_features"]:
        """Attends within ``x``; ``train=True`` moves centroids and sows the loss."""
        features, options = x.shape[-1], self.routing
        _, _, dim = head_sizes(features, self.num_heads, None, self.head_dim)
        local = options.num_local_of(self.num_heads)
        linear = partial(
            linen.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=self.kernel_init,
        )  # fmt: skip
        q = linear((self.num_heads, dim), name="query")(x)
        v = linear((self.num_heads, dim), name="value")(x)
        keys = local if options.share_qk else self.num_heads
        k = linear((keys, dim), name="key")(x) if keys else None
        q, k, routed = options.attended(q, k, self.transform_qk)
        variables = self._clusters(self.num_heads - local, dim)
        state = ClusterState(*(x.value for x in variables))
        out = attention(
            q, k, v, options.spec(self.num_heads),
            operands={"centroids": state.means}, impl=self.impl, config=self.config,
        )  # fmt: skip
        if train and not self.is_initializing():
            moved, loss = options.learned(state, routed)
            for variable, value in zip(variables, moved, strict=True):
                variable.value = value
            self.sow("losses", "commitment", loss)
        out_features = features if self.out_features is None else self.out_features
        return linear(out_features, axis=(-2, -1), name="out")(cast(Array, out))

    def _clusters(self, heads: int, dim: int) -> list[linen.Variable]:
        """The variables of the centroids, counts and sums."""
        sizes = heads, self.routing.num_clusters, dim

        def start(field: str) -> Array:
            made = initial(self.make_rng("params"), *sizes, norm=self.routing.norm)
            return getattr(made, field)

        # With counts of 1, the sums equal the centroids.
        means = self.variable("routing", "centroids", start, "means")
        counts = self.variable("routing", "counts", jnp.ones, sizes[:2])
        sums = self.variable("routing", "sums", lambda: jnp.copy(means.value))
        return [means, counts, sums]
