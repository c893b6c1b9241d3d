"""Sparse attention as a layer of Flax Linen."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.attention import any_term, attention
from sadsl.layers.heads import head_sizes
from sadsl.layers.routing import Routing
from sadsl.layers.state import Clusters, initial
from sadsl.terms import Spec


class SparseAttention(linen.Module):
    """Projections to heads, attention over the pairs of ``spec``, projection back.

    The fields are those of ``sadsl.layers.nnx.SparseAttention``, but ``in_features`` is
    read off the input. The parameters are those of Linen's own
    ``MultiHeadDotProductAttention``, by name and shape.
    """

    spec: Spec | str
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = linen.initializers.lecun_normal()
    transform_qk: Callable[[Array, Array], tuple[Array, Array]] | None = None
    impl: str | None = None
    config: KernelConfig | None = None

    def __post_init__(self) -> None:
        # Text is read once: Linen makes its copies of a module from these fields.
        object.__setattr__(self, "spec", any_term(self.spec))
        super().__post_init__()

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "batch q_seq in_features"],
        kv: Float[Array, "batch kv_seq in_features"] | None = None,
        *,
        q_segment_ids: Integer[Array, "..."] | None = None,
        kv_segment_ids: Integer[Array, "..."] | None = None,
        operands: Mapping[str, Any] | None = None,
    ) -> Float[Array, "batch q_seq out_features"]:
        """Attends from ``x`` to ``kv``, or to itself if None."""
        kv = x if kv is None else kv
        features = x.shape[-1]
        queries, keys, dim = head_sizes(
            features, self.num_heads, self.num_kv_heads, self.head_dim
        )
        linear = partial(
            linen.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=self.kernel_init,
        )  # fmt: skip
        q = linear((queries, dim), name="query")(x)
        k = linear((keys, dim), name="key")(kv)
        v = linear((keys, dim), name="value")(kv)
        if self.transform_qk is not None:
            q, k = self.transform_qk(q, k)
        out = attention(
            q, k, v, self.spec,
            q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
            operands=operands, impl=self.impl, config=self.config,
        )  # fmt: skip
        out_features = features if self.out_features is None else self.out_features
        return linear(out_features, axis=(-2, -1), name="out")(cast(Array, out))


class RoutingAttention(linen.Module):
    """Routing attention: some heads local, the others clustered by content; causal.

    The fields are those of ``sadsl.layers.nnx.RoutingAttention``. The centroids are in
    the collection ``routing`` (``centroids``, ``counts``, ``sums``), to be made mutable
    in training; the commitment loss is sown as ``losses/commitment``, f32::

        y, state = layer.apply(variables, x, train=True, mutable=["routing", "losses"])

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4.
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
        state = Clusters(*(x.value for x in variables))
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

        # The sums start as the centroids are.
        means = self.variable("routing", "centroids", start, "means")
        counts = self.variable("routing", "counts", jnp.ones, sizes[:2])
        sums = self.variable("routing", "sums", lambda: jnp.copy(means.value))
        return [means, counts, sums]
