"""Sparse attention as a layer of Flax NNX."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.attention import any_term, attention
from sadsl.layers.heads import head_sizes
from sadsl.layers.routing import Routing
from sadsl.layers.state import Clusters, initial, lloyd
from sadsl.selections.kmeans import normalized
from sadsl.terms import Spec

DEFAULT_KERNEL_INIT = nnx.initializers.lecun_normal()


class SparseAttention(nnx.Module):
    """Projections to heads, attention over the pairs of ``spec``, projection back.

    Its parameters are those of ``nnx.MultiHeadAttention``, by name and shape:
    ``query``, ``key``, ``value`` and ``out``.
    """

    def __init__(
        self,
        spec: Spec | str,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
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
        """Makes the parameters; text is read here, once.

        Args:
          spec: an index map, a term, or the text of one.
          num_heads, num_kv_heads: heads of the queries, and of keys and values
            (``num_heads`` if None), which must divide them.
          in_features, out_features: of ``x``; of the result, ``in_features`` if None.
          head_dim: ``in_features // num_heads`` if None.
          use_bias: whether the four projections have one.
          dtype, param_dtype: of the computation (that of the input and the parameters,
            promoted, if None) and of the parameters.
          kernel_init: initializer of the four kernels.
          transform_qk: applied to the projected queries and keys, each
            ``[batch, seq, heads, head_dim]``: rotary positions, say.
          impl, config: as in ``sadsl.attention``.
          rngs: where ``rngs.params`` comes from.

        Raises:
          ValueError: the sizes do not divide, or the text is not a spec.
        """
        self.term = any_term(spec)
        self.sizes = head_sizes(in_features, num_heads, num_kv_heads, head_dim)
        self.in_features = in_features
        self.transform_qk = transform_qk
        self.impl, self.config = impl, config
        linear = partial(
            nnx.LinearGeneral, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
            kernel_init=kernel_init, rngs=rngs,
        )  # fmt: skip
        queries, keys, dim = self.sizes
        self.query = linear(in_features, (queries, dim))
        self.key = linear(in_features, (keys, dim))
        self.value = linear(in_features, (keys, dim))
        out_features = in_features if out_features is None else out_features
        self.out = linear((queries, dim), out_features, axis=(-2, -1))

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
        q, k, v = self.query(x), self.key(kv), self.value(kv)
        if self.transform_qk is not None:
            q, k = self.transform_qk(q, k)
        out = attention(
            q, k, v, self.term,
            q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
            operands=operands, impl=self.impl, config=self.config,
        )  # fmt: skip
        return self.out(cast(Array, out))


class Centroids(nnx.Variable):
    """Centroids of a ``RoutingAttention``, with the moving sums that they come from."""


class CommitmentLoss(nnx.Variable):
    """The commitment loss of the last step of a ``RoutingAttention``, f32."""


class RoutingAttention(nnx.Module):
    """Routing attention: some heads local, the others clustered by content; causal.

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4. The centroids are ``Centroids`` variables, not parameters: in
    training each call moves them and sets ``commitment_loss``, which belongs in the
    loss::

        def loss(model, x, y):
            return cross_entropy(model(x), y) + commitment_loss(model)

    ``model.eval()`` leaves them as they are, as it does for ``nnx.BatchNorm``.
    Parameters: ``query``, ``value``, ``out``, and ``key`` for the heads whose keys are
    not their queries (all heads if not ``routing.share_qk``, else the local ones).
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
          transform_qk: applied to queries and keys of the local heads, such as rotary
            positions; what is clustered has none.
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
        # The name that nnx.Module.train() and .eval() set.
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
            state = Clusters(self.centroids[...], self.counts[...], self.sums[...])
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


def commitment_loss(model: nnx.Module) -> Float[Array, ""]:
    """The sum of the commitment losses of all routing layers in their last call."""
    losses = jax.tree.leaves(nnx.state(model, CommitmentLoss))
    return sum(losses, start=jnp.zeros((), jnp.float32))
