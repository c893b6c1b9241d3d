"""``SparseAttention`` of Flax Linen: projections around any spec."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.decode.cache import DecodingCache, init_cache
from sadsl.decode.keys import positions_of
from sadsl.decode.step import prefill
from sadsl.layers.heads import head_sizes
from sadsl.layers.learned import learned_of, operands_of, rate_checked, started, width
from sadsl.layers.linear_gates import Parameter
from sadsl.layers.stack import Specs, check_heads, of_layer
from sadsl.layers.transforms import (
    HeadTransforms,
    TokenPositions,
    Transforms,
    token_positions,
    with_bias,
)
from sadsl.sharding.call import attention_over
from sadsl.sharding.mesh_axes import MeshAxes
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
    mesh_axes: MeshAxes | None = None

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
        cache: DecodingCache | None = None,
    ) -> Any:
        """Attends from ``x`` to ``kv``, or to ``x`` itself if None.

        ``positions`` and ``kv_positions`` are those of the NNX layer. ``operands`` go
        before what the layer learned under their names. Where there is dropout,
        ``deterministic`` must be given, here or as a field.

        With ``cache``, of ``init_cache``, ``x`` are new tokens behind those of it, and
        the result is a tuple of their outputs and the new cache. ``transform_qk`` is
        then called with ``positions=``, those of the new tokens.

        Returns:
          ``[batch, q_seq, out_features]``, perhaps with a cache.

        Raises:
          ValueError: ``kv`` or ``positions`` beside a cache.
        """
        other = self.transform_qk
        if cache is None:
            at = token_positions(
                (x.shape, None if kv is None else kv.shape), positions, kv_positions,
                (q_segment_ids, kv_segment_ids),
            )  # fmt: skip
        else:
            at, other = _behind(cache, x, other, (kv, positions, kv_positions))
        options = {
            "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids,
            "operands": operands,
        }  # fmt: skip
        if cache is None:
            rate, key = self._dropout(deterministic)
            options |= {"dropout_rate": rate, "dropout_key": key}
        made, cache = self._run(x, x if kv is None else kv, at, other, cache, options)
        return made if cache is None else (made, cache)

    def _run(
        self, x: Array, kv: Array, at: TokenPositions, other: Any,
        cache: DecodingCache | None, options: dict[str, Any],
    ) -> tuple[Array, DecodingCache | None]:  # fmt: skip
        """The output and the cache of a call; ``options`` are of what it calls."""
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
        q, k, v = around.before(params, (q, k, v), at, other)
        options |= {"sm_scale": around.scale, "impl": self.impl, "config": self.config}
        options["operands"] = {**self._given(x, sizes), **(options["operands"] or {})}
        if cache is None:
            attend = attention_over(self.mesh_axes)
            out = cast(Array, attend(q, k, v, self._term(dim), **options))
        else:
            cache, out = prefill(cache, q, k, v, **options)
        axes = around.gate_axes(sizes)
        logits = linear("gate", axes)(x) if axes else None
        out = around.after(params, out, logits, at)
        features = self.out_features or x.shape[-1]
        return linear("out", features, axis=(-2, -1))(out), cache

    @linen.nowrap
    def init_cache(
        self, batch: int, max_len: int, in_features: int, **options: Any
    ) -> DecodingCache:
        """The empty cache of the layer; see ``sadsl.init_cache``.

        Args:
          batch, max_len: as there.
          in_features: features of the inputs.
          **options: ``operands``, ``ragged``, ``page_size``, ``num_pages``: as there.

        Raises:
          ValueError, NotImplementedError: as there.
        """
        queries, keys, dim, *_ = self._sizes(in_features)
        return init_cache(
            self._term(dim), batch, max_len, keys, dim,
            self.param_dtype if self.dtype is None else self.dtype,
            num_heads=queries, **options,
        )  # fmt: skip

    def _term(self, head_dim: int) -> Term:
        """The term that runs."""
        term = cast(Term, self.spec)
        return self._around.term(term, head_dim, self.transform_qk)

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


def _behind(
    cache: DecodingCache, x: Array, other: Any, refused: tuple[Any, ...]
) -> tuple[TokenPositions, Any]:
    """The positions of new tokens, and the function of queries and keys at them.

    Raises:
      ValueError: an argument has no meaning beside a cache.
    """
    if any(value is not None for value in refused):
        raise ValueError(
            "kv, positions and kv_positions have no meaning beside cache=: new tokens "
            "are behind those of the cache; leave them out"
        )
    at = positions_of(jnp.asarray(cache.length), x.shape[1])
    return TokenPositions(at, at), None if other is None else partial(
        other, positions=at
    )


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
