"""Sparse attention as a layer of Flax NNX."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.attention import as_term, attention
from sadsl.layers.heads import head_sizes
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
        self.term = as_term(spec)
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
