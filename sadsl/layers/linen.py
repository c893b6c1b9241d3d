"""Sparse attention as a layer of Flax Linen."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.layers.heads import head_sizes
from sadsl.layers.indexed_linen import IndexedAttention as IndexedAttention
from sadsl.layers.learned import learned_of, operands_of, rate_checked, started, width
from sadsl.layers.linear_gates import Parameter
from sadsl.layers.linear_linen import DeltaNet as DeltaNet
from sadsl.layers.linear_linen import GatedDeltaNet as GatedDeltaNet
from sadsl.layers.linear_linen import GatedLinearAttention as GatedLinearAttention
from sadsl.layers.linear_linen import KimiDelta as KimiDelta
from sadsl.layers.linear_linen import LightNet as LightNet
from sadsl.layers.linear_linen import LinearAttention as LinearAttention
from sadsl.layers.routing import Routing
from sadsl.layers.stack import Specs, check_heads, of_layer
from sadsl.layers.state import ClusterState, initial
from sadsl.layers.transforms import HeadTransforms, Transforms, places, with_bias
from sadsl.run.call import attention
from sadsl.terms.base import LayerSizes, Learned, Term


class SparseAttention(linen.Module):
    """Projects to heads, attends to the pairs of ``spec``, and projects back.

    The fields are those of ``sadsl.layers.nnx.SparseAttention``, but ``in_features``
    and ``in_kv_features`` are read off the inputs, and annotations are those of
    ``linen.with_partitioning``. The parameters are those of Linen's own
    ``MultiHeadDotProductAttention``, by name and shape. What the spec learns is under
    ``learned``. Dropout draws from the stream "dropout".

    Example:
      >>> import jax
      >>> from sadsl.layers.linen import SparseAttention
      >>> layer = SparseAttention("causal() & window(2)", num_heads=2, num_kv_heads=1)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, in_features]
      >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
      >>> y.shape, variables["params"]["key"]["kernel"].shape
      ((1, 6, 8), (8, 1, 4))
    """

    spec: Specs
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool | Collection[str] = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = linen.initializers.lecun_normal()
    transform_qk: Callable[[Array, Array], tuple[Array, Array]] | None = None
    impl: str | None = None
    config: KernelConfig | None = None
    layer: int | None = None
    num_q_heads: int | None = None
    modules: Mapping[str, Any] | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    transforms: Transforms = None
    out_kernel_init: Callable[..., Any] | None = None
    bias_init: Callable[..., Any] = linen.initializers.zeros_init()
    out_bias_init: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        # Reads text once: Linen makes its copies of a module from these fields.
        spec, around = of_layer(self.spec, self.layer, self.transforms)
        for name, value in (("spec", spec), ("transforms", around), ("layer", None)):
            object.__setattr__(self, name, value)
        if not isinstance(self.use_bias, bool):
            # Linen compares modules by their fields.
            object.__setattr__(self, "use_bias", tuple(self.use_bias))
        rate_checked(self.dropout_rate)
        super().__post_init__()

    @linen.compact
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
    ) -> Float[Array, "batch q_seq out_features"]:
        """Attends from ``x`` to ``kv``, or to ``x`` itself if None.

        ``positions`` and ``kv_positions`` are those of the NNX layer. ``operands`` go
        before what the layer learned under their names. Where there is dropout,
        ``deterministic`` must be given, here or as a field.
        """
        at = places(
            (x.shape, None if kv is None else kv.shape), positions, kv_positions,
            (q_segment_ids, kv_segment_ids),
        )  # fmt: skip
        kv = x if kv is None else kv
        sizes, around = self._sizes(x.shape[-1]), self._around
        queries, keys, dim, *_ = sizes
        linear = self._linear()
        q = linear("query", (queries, dim))(x)
        k = linear("key", (keys, dim))(kv)
        v = None if around.share_kv else linear("value", (keys, dim))(kv)
        params = {
            name: _Arrays(tuple(arrays.items()), self.param_dtype, name=name)()
            for name, arrays in around.parameters(sizes).items()
        }
        q, k, v = around.before(params, (q, k, v), at, self.transform_qk)
        term = cast(Term, self.spec)
        rate, key = self._dropout(deterministic)
        out = attention(
            q, k, v, around.term(term, dim, self.transform_qk),
            q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
            operands={**self._given(x, sizes), **(operands or {})},
            sm_scale=around.scale, impl=self.impl, config=self.config,
            dropout_rate=rate, dropout_key=key,
        )  # fmt: skip
        axes = around.gate_axes(sizes)
        logits = linear("gate", axes)(x) if axes else None
        out = around.after(params, cast(Array, out), logits, at)
        features = self.out_features or x.shape[-1]
        return linear("out", features, axis=(-2, -1))(out)

    @property
    def _around(self) -> HeadTransforms:
        return cast(HeadTransforms, self.transforms)

    def _sizes(self, features: int) -> LayerSizes:
        """The sizes of the layer for an input of so many features."""
        queries, keys, dim = head_sizes(
            features, self.num_heads, self.num_kv_heads, self.head_dim, self.num_q_heads
        )
        sizes = LayerSizes(queries, keys, dim, dim, features)
        check_heads(cast(Term, self.spec), queries)
        self._around.check(sizes)
        return sizes

    def _linear(self) -> Callable[..., Any]:
        """Makes the projection of a name."""
        biased = with_bias(self.use_bias, self._around)
        inits = {"kernel": self.kernel_init, "bias": self.bias_init}
        of_out = {"kernel": self.out_kernel_init, "bias": self.out_bias_init}

        def make(name: str, axes: Any, **options: Any) -> linen.DenseGeneral:
            starts = dict(inits)
            if name == "out":
                starts |= {key: init for key, init in of_out.items() if init}
            elif name == "gate" and len(axes) == 1:
                starts = {key: _unannotated(init) for key, init in starts.items()}
            return linen.DenseGeneral(
                axes, dtype=self.dtype, param_dtype=self.param_dtype, name=name,
                kernel_init=starts["kernel"], bias_init=starts["bias"],
                use_bias=name in biased, **options,
            )  # fmt: skip

        return make

    def _given(self, x: Array, sizes: LayerSizes) -> dict[str, Any]:
        """The arrays and functions that the layer has for the spec, by name."""
        modules = dict(self.modules or {})
        wanted = learned_of(cast(Term, self.spec), sizes, modules)
        if not wanted:
            return modules
        common = partial(
            linen.DenseGeneral, dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=_unannotated(self.kernel_init),
        )  # fmt: skip
        learn = _Learned(
            tuple(wanted.items()), common, self.param_dtype, name="learned"
        )
        return {**modules, **learn(x)}

    def _dropout(self, deterministic: bool | None) -> tuple[float, Array | None]:
        """The dropout rate of this call, and the PRNG key."""
        if not self.dropout_rate:
            return 0.0, None
        asked = linen.merge_param("deterministic", self.deterministic, deterministic)
        return (0.0, None) if asked else (self.dropout_rate, self.make_rng("dropout"))


def _unannotated(init: Callable[..., Any]) -> Callable[..., Array]:
    """``init`` without sharding names, for kernels of another number of axes."""
    return lambda *args: linen.meta.unbox(init(*args))


class _Arrays(linen.Module):
    """A group of parameters, by name."""

    wanted: tuple[tuple[str, Parameter], ...]
    param_dtype: DTypeLike

    @linen.compact
    def __call__(self) -> dict[str, Array]:
        return {
            name: self.param(name, start, shape, self.param_dtype)
            for name, (shape, start) in self.wanted
        }


class _Learned(linen.Module):
    """The operands that a spec learns, by name."""

    wanted: tuple[tuple[str, Learned], ...]
    linear: Callable[..., Any]
    param_dtype: DTypeLike

    @linen.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        made: dict[str, Any] = {}
        for name, array in self.wanted:
            start = started(array)
            if array.per_query:
                made[name] = self.linear(width(array), bias_init=start, name=name)
            else:
                made[name] = self.param(name, start, array.shape, self.param_dtype)
        return operands_of(dict(self.wanted), made, x)


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
