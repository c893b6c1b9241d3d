"""Sparse attention as a layer of Flax NNX."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.layers.heads import head_sizes
from sadsl.layers.indexed_nnx import IndexedAttention as IndexedAttention
from sadsl.layers.learned import learned_of, operands_of, rate_checked
from sadsl.layers.linear_nnx import DeltaNet as DeltaNet
from sadsl.layers.linear_nnx import GatedDeltaNet as GatedDeltaNet
from sadsl.layers.linear_nnx import GatedLinearAttention as GatedLinearAttention
from sadsl.layers.linear_nnx import KimiDelta as KimiDelta
from sadsl.layers.linear_nnx import LightNet as LightNet
from sadsl.layers.linear_nnx import LinearAttention as LinearAttention
from sadsl.layers.nnx_parts import Centroids as Centroids
from sadsl.layers.nnx_parts import CommitmentLoss as CommitmentLoss
from sadsl.layers.nnx_parts import (
    NnxLinear,
    learned_variables,
    parameter_group,
    projections,
)
from sadsl.layers.nnx_parts import commitment_loss as commitment_loss
from sadsl.layers.routing import Routing
from sadsl.layers.stack import Specs, check_heads, of_layer
from sadsl.layers.state import ClusterState, initial, lloyd
from sadsl.layers.transforms import Transforms, places, with_bias
from sadsl.run.call import attention
from sadsl.selections.kmeans import normalized
from sadsl.terms.base import LayerSizes

DEFAULT_KERNEL_INIT = nnx.initializers.lecun_normal()
ZEROS = nnx.initializers.zeros_init()
POSITION_INIT = nnx.initializers.normal(0.02)


class SparseAttention(nnx.Module):
    """Projects to heads, attends to the pairs of ``spec``, and projects back.

    Its parameters are those of ``nnx.MultiHeadAttention``, by name and shape:
    ``query``, ``key``, ``value`` and ``out``. What the spec learns is in ``learned``,
    by the name of the operand: sinks and tables are parameters; gates and other arrays
    of each query are projections of ``x``, with a bias. What ``transforms`` learns is
    in ``gate`` (a projection), ``query_ln``, ``key_ln``, ``value_ln`` and ``rotary``.

    Initializers may be annotated, by ``nnx.with_partitioning``: kernels are
    ``[features, heads, head_dim]``, that of ``out`` is ``[heads, head_dim, features]``.
    What the spec learns, norms and a gate by head have no annotation.

    Args:
      spec: a map, a term, or text; or a list of them, one for each layer, such as a
        head plan.
      num_heads: heads; must divide the features if ``head_dim`` is None.
      in_features: features of ``x``.
      layer: which entry of lists of specs and of transforms, from 0.
      num_q_heads: query heads, ``num_heads`` or fewer; ``num_heads`` if None.
      num_kv_heads: heads of keys and values, which must divide the query heads; as many
        if None.
      head_dim: width of a head; ``in_features // num_heads`` if None.
      out_features: features of the result; ``in_features`` if None.
      in_kv_features: features of ``kv``; ``in_features`` if None.
      transforms: rotary positions, norms, shared keys and values, an output gate; or a
        list of them, one for each layer.
      use_bias: whether the four projections have a bias; or the names of those that
        have one, of "query", "key", "value", "out" and "gate".
      dtype: of the computation; promoted from input and parameters if None.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers of kernels and biases.
      out_kernel_init, out_bias_init: those of ``out``, if not the same.
      transform_qk: function of queries and keys, each ``[batch, seq, heads,
        head_dim]``, after those of ``transforms``.
      modules: functions with parameters that the spec names, such as feature maps.
      dropout_rate: share of the attention weights that is dropped while
        ``deterministic`` is False.
      impl, config: as in ``sadsl.attention``.
      rngs: where ``rngs.params`` and, for dropout, ``rngs.dropout`` come from.

    Raises:
      ValueError: the sizes do not divide, the text is no spec, there is no such layer
        or projection, the spec is for other heads, more channels turn than a head has,
        or the spec reads nothing of the name of a module.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import SparseAttention
      >>> def model(x):
      ...     layer = SparseAttention("causal() & window(2)", 2, 8, rngs=nnx.Rngs(0))
      ...     return layer(x)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, in_features]
      >>> jax.eval_shape(model, x).shape
      (1, 6, 8)
    """

    def __init__(
        self,
        spec: Specs,
        num_heads: int,
        in_features: int,
        *,
        layer: int | None = None,
        num_q_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        in_kv_features: int | None = None,
        transforms: Transforms = None,
        use_bias: bool | Collection[str] = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = DEFAULT_KERNEL_INIT,
        out_kernel_init: Callable[..., Any] | None = None,
        bias_init: Callable[..., Any] = ZEROS,
        out_bias_init: Callable[..., Any] | None = None,
        transform_qk: Callable[[Array, Array], tuple[Array, Array]] | None = None,
        modules: Mapping[str, Any] | None = None,
        dropout_rate: float = 0.0,
        impl: str | None = None,
        config: KernelConfig | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters and reads text once. The class lists the arguments."""
        self.term, self.transforms = of_layer(spec, layer, transforms)
        queries, keys, dim = head_sizes(
            in_features, num_heads, num_kv_heads, head_dim, num_q_heads
        )
        check_heads(self.term, queries)
        self.sizes = LayerSizes(queries, keys, dim, dim, in_features)
        self.transforms.check(self.sizes)
        self.in_features, self.transform_qk = in_features, transform_qk
        self.in_kv_features = in_kv_features or in_features
        self.impl, self.config = impl, config
        # nnx.Module.train() and .eval() set the attribute of this name.
        self.deterministic = False
        self.dropout_rate = rate_checked(dropout_rate)
        linear = NnxLinear(dtype, param_dtype, kernel_init, bias_init, rngs)
        inits = out_kernel_init or kernel_init, out_bias_init or bias_init
        features = in_features, self.in_kv_features, out_features or in_features
        biased = with_bias(use_bias, self.transforms)
        self.query, self.key, self.value, self.out, self.gate = projections(
            linear, self.sizes, features, self.transforms, biased, inits
        )
        wanted = learned_of(self.term, self.sizes, modules)
        self.learned = learned_variables(wanted, linear, in_features)
        for name, arrays in self.transforms.parameters(self.sizes).items():
            setattr(self, name, parameter_group(arrays, param_dtype, rngs))
        self.modules = nnx.Dict(dict(modules)) if modules else None
        # Last, so that dropout does not change how the parameters start.
        self.rngs = rngs["dropout"].fork() if self.dropout_rate else None

    def __call__(
        self,
        x: Float[Array, "batch q_seq in_features"],
        kv: Float[Array, "batch kv_seq in_kv_features"] | None = None,
        *,
        positions: Integer[Array, "..."] | None = None,
        kv_positions: Integer[Array, "..."] | None = None,
        q_segment_ids: Integer[Array, "..."] | None = None,
        kv_segment_ids: Integer[Array, "..."] | None = None,
        operands: Mapping[str, Any] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch q_seq out_features"]:
        """Attends from ``x`` to ``kv``, or to ``x`` itself if None.

        ``positions`` and ``kv_positions``, ``[seq]`` or ``[batch, seq]``, are what
        rotary positions turn by: by default from 0, and again from 0 where a segment id
        changes; those of ``kv`` are ``positions`` if it is None. The spec does not read
        them. ``operands`` go before what the layer learned under their names.
        ``deterministic=True`` drops nothing; ``rngs`` take the place of the layer's.

        Raises:
          ValueError: positions have another shape, or are no integers.
        """
        at = places(
            (x.shape, None if kv is None else kv.shape), positions, kv_positions,
            (q_segment_ids, kv_segment_ids),
        )  # fmt: skip
        kv = x if kv is None else kv
        around, params = self.transforms, self._groups()
        v = None if self.value is None else self.value(kv)
        qkv = self.query(x), self.key(kv), v
        q, k, v = around.before(params, qkv, at, self.transform_qk)
        asked = self.deterministic if deterministic is None else deterministic
        rate = 0.0 if asked else self.dropout_rate
        out = attention(
            q, k, v, around.term(self.term, self.sizes.head_dim, self.transform_qk),
            q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
            operands={**self._given(x), **(operands or {})}, sm_scale=around.scale,
            impl=self.impl, config=self.config,
            dropout_rate=rate, dropout_key=self._dropout_key(rngs) if rate else None,
        )  # fmt: skip
        logits = None if self.gate is None else self.gate(x)
        return self.out(around.after(params, cast(Array, out), logits, at))

    def _groups(self) -> dict[str, dict[str, Array]]:
        """What the transforms learned."""
        groups = self.transforms.parameters(self.sizes)
        return {
            name: {key: getattr(self, name)[key][...] for key in arrays}
            for name, arrays in groups.items()
        }

    def _given(self, x: Array) -> dict[str, Any]:
        """The arrays and functions that the layer has for the spec, by name."""
        modules = dict(self.modules.items()) if self.modules else {}
        if self.learned is None:
            return modules
        wanted = learned_of(self.term, self.sizes, modules)
        made = {
            name: value[...] if isinstance(value, nnx.Param) else value
            for name, value in self.learned.items()
        }
        return {**modules, **operands_of(wanted, made, x)}

    def _dropout_key(self, rngs: nnx.Rngs | None) -> Array:
        stream = self.rngs if rngs is None else rngs["dropout"]
        assert stream is not None
        return stream()


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
