"""``SparseAttention`` of Flax NNX: projections around any spec."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.decode.cache import DecodingCache, init_cache
from sadsl.decode.keys import positions_of
from sadsl.decode.step import prefill
from sadsl.layers.heads import head_sizes
from sadsl.layers.learned import learned_of, operands_of, rate_checked
from sadsl.layers.nnx_parts import (
    NnxLinear,
    learned_variables,
    parameter_group,
    projections,
)
from sadsl.layers.stack import Specs, check_heads, of_layer
from sadsl.layers.transforms import (
    QueryKeyFunction,
    TokenPositions,
    Transforms,
    token_positions,
    with_bias,
)
from sadsl.sharding.call import attention_over
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.terms.base import LayerSizes, Term

DEFAULT_KERNEL_INIT = nnx.initializers.lecun_normal()
ZEROS = nnx.initializers.zeros_init()


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
      mesh_axes: the devices that batch, heads and sequence are dealt over, as in
        ``sadsl.sharded_attention``; of calls, not of ``decode``.
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
        mesh_axes: MeshAxes | None = None,
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
        self.impl, self.config, self.mesh_axes = impl, config, mesh_axes
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
        at = token_positions(
            (x.shape, None if kv is None else kv.shape), positions, kv_positions,
            (q_segment_ids, kv_segment_ids),
        )  # fmt: skip
        q, k, v = self._before(x, x if kv is None else kv, at, self.transform_qk)
        asked = self.deterministic if deterministic is None else deterministic
        rate = 0.0 if asked else self.dropout_rate
        out = attention_over(self.mesh_axes)(
            q, k, v, self.spec,
            q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
            operands={**self._given(x), **(operands or {})},
            sm_scale=self.transforms.scale, impl=self.impl, config=self.config,
            dropout_rate=rate, dropout_key=self._dropout_key(rngs) if rate else None,
        )  # fmt: skip
        return self._after(x, cast(Array, out), at)

    def init_cache(
        self,
        batch: int,
        max_len: int,
        *,
        operands: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> DecodingCache:
        """The empty cache of the layer, for ``decode``; see ``sadsl.init_cache``.

        Args:
          batch, max_len, operands: as there. What the layer learned or projects need
            not be in ``operands``.
          **options: ``ragged``, ``page_size`` and ``num_pages``, as there.

        Raises:
          ValueError, NotImplementedError: as there.
        """
        like = jax.ShapeDtypeStruct((batch, 1, self.in_features), jnp.float32)
        q, k, v, given = jax.eval_shape(self._projected, like)
        functions = dict(self.modules.items()) if self.modules else {}
        return init_cache(
            self.spec, batch, max_len, k.shape[2], k.shape[3], k.dtype,
            num_heads=q.shape[2], num_v_heads=v.shape[2], head_dim_v=v.shape[3],
            operands={**functions, **given, **(operands or {})}, **options,
        )  # fmt: skip

    def decode(
        self,
        x: Float[Array, "batch seq in_features"],
        cache: DecodingCache,
        *,
        operands: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "batch seq out_features"], DecodingCache]:
        """Adds tokens to a cache: their outputs, and the new cache.

        The outputs are those of the layer over all tokens. Rotary positions go on
        behind those of the cache; ``transform_qk`` is called with ``positions=``,
        those ``[seq]`` or ``[batch, seq]`` of the new tokens.

        Args:
          x: the new tokens.
          cache: of ``init_cache``, or of an earlier call.
          operands: as in a call of the layer, for the new tokens.
          **options: others of ``sadsl.prefill``, such as segment ids.

        Raises:
          ValueError, NotImplementedError: as ``sadsl.prefill``.
        """
        at = positions_of(jnp.asarray(cache.length), x.shape[1])
        turned: Any = self.transform_qk
        if turned is not None:
            turned = partial(turned, positions=at)
        q, k, v = self._before(x, x, TokenPositions(at, at), turned)
        cache, out = prefill(
            cache, q, k, v, operands={**self._given(x), **(operands or {})},
            sm_scale=self.transforms.scale, impl=self.impl, config=self.config,
            **options,
        )  # fmt: skip
        return self._after(x, out, TokenPositions(at, at)), cache

    @property
    def spec(self) -> Term:
        """The term that runs."""
        return self.transforms.term(self.term, self.sizes.head_dim, self.transform_qk)

    def _projected(self, x: Array) -> tuple[Array, Array, Array, dict[str, Any]]:
        """What a call gets for ``x``, without functions."""
        at = jnp.zeros(x.shape[1], jnp.int32)
        given = {n: y for n, y in self._given(x).items() if not callable(y)}
        return *self._before(x, x, TokenPositions(at, at), None), given

    def _before(
        self, x: Array, kv: Array, at: TokenPositions, turned: QueryKeyFunction | None
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, projected and transformed."""
        v = None if self.value is None else self.value(kv)
        qkv = self.query(x), self.key(kv), v
        return self.transforms.before(self._groups(), qkv, at, turned)

    def _after(self, x: Array, out: Array, at: TokenPositions) -> Array:
        """The output of the layer, from that of the heads."""
        logits = None if self.gate is None else self.gate(x)
        return self.out(self.transforms.after(self._groups(), out, logits, at))

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
