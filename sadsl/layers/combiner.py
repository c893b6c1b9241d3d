"""Combiner as a layer that replaces self-attention, for Flax NNX and for Flax Linen.

Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, assert_never, get_args

import jax
from flax import linen, nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.config import KernelConfig
from sadsl.catalog import combiner as published
from sadsl.catalog.combiner import Form
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.terms.base import Term
from sadsl.terms.grid_regions import KeyOf
from sadsl.terms.regions import Pool

Variant = Literal["fixed", "logsparse", "vertical", "horizontal", "rowmajor", "mixture"]
Features = Literal["identity", "relu", "deepsets"]
# Names of the operands that functions with parameters are passed as.
PHI, PROJ = "phi", "proj"


@dataclass(frozen=True)
class Combiner:
    """The options of a Combiner layer; see the functions ``sadsl.catalog.combiner_*``.

    Attributes:
      variant: which of these functions; "vertical", "horizontal" and "rowmajor" are the
        axial forms.
      size: tokens in a span, or in a row.
      causal: whether later tokens are hidden.
      pool: "max", "mean" or "sum".
      features: what is pooled: "identity", "relu", or "deepsets", a dense layer and a
        ReLU on the features of a head, the same for queries and keys and all heads.
      key: the key of a row in the form "rowmajor". "proj" (the published layer) makes
        it from the input ``x`` and the row's value ``v``, as ``dense(layer_norm(x +
        dense(v)))``; "wsum_proj" takes the mean of keys in place of ``v``.
      form: of "mixture": "paper" or "code".

    Raises:
      ValueError: there is no such variant, or no such features.

    Example:
      >>> from sadsl.layers.combiner import Combiner
      >>> Combiner("fixed", size=4).spec()
      joint(blocks(4) & causal(), summaries(spans(4)))
    """

    variant: Variant = "fixed"
    size: int = 32
    causal: bool = True
    pool: Pool = "max"
    features: Features = "identity"
    key: KeyOf = "proj"
    form: Form = "paper"

    def __post_init__(self) -> None:
        for name, known in (("variant", Variant), ("features", Features)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"Combiner: {name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(get_args(known))}"
                )

    @property
    def phi(self) -> str:
        """The feature map as ``sadsl.summaries`` names it."""
        return PHI if self.features == "deepsets" else self.features

    @property
    def has_phi(self) -> bool:
        """Whether the feature map has parameters."""
        return self.features == "deepsets" and self.variant != "rowmajor"

    @property
    def has_proj(self) -> bool:
        """Whether the keys of rows have parameters."""
        return self.variant == "rowmajor" and "proj" in self.key

    def spec(self) -> Term:
        """The term that the layer attends by."""
        size, pooled = self.size, (self.causal, self.pool, self.phi)
        match self.variant:
            case "fixed":
                return published.combiner_fixed(size, *pooled)
            case "logsparse":
                return published.combiner_logsparse(*pooled)
            case "vertical":
                return published.combiner_axial_vertical(size, *pooled)
            case "horizontal":
                return published.combiner_axial_horizontal(size, *pooled)
            case "rowmajor":
                return published.combiner_axial_rowmajor(
                    size, self.causal, self.key, PROJ
                )
            case "mixture":
                return published.combiner_mixture(size, self.form, *pooled)
        assert_never(self.variant)


class RowKeys(nnx.Module):
    """Makes the keys of rows: ``dense(layer_norm(x + dense(v)))``."""

    def __init__(
        self, features: int, num_heads: int, head_dim: int, *, rngs: nnx.Rngs
    ) -> None:
        """Makes two dense layers without bias, and a norm between them."""
        heads = num_heads, head_dim
        linear = partial(nnx.LinearGeneral, use_bias=False, rngs=rngs)
        self.mix = linear(heads, features, axis=(-2, -1))
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.out = linear(features, heads)

    def __call__(
        self, v: Float[Array, "batch seq heads dim"], x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch seq heads dim"]:
        """One key for each token and head."""
        return self.out(self.norm(x + self.mix(v)))


class CombinerAttention(nnx_layers.SparseAttention):
    """Combiner self-attention for Flax NNX: every visible token has a weight.

    It maps ``x``, ``[batch, seq, in_features]``, to the same shape. Parameters:
    ``query``, ``key``, ``value`` and ``out`` as in ``nnx.MultiHeadAttention``; ``phi``
    for "deepsets"; ``proj`` for keys of rows.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      num_heads: query heads.
      in_features: features of the input and of the output.
      combiner: the options; ``Combiner()`` if None.
      rngs: where ``rngs.params`` comes from.
      **options: those of ``sadsl.layers.nnx.SparseAttention``.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.combiner import Combiner, CombinerAttention
      >>> def model(x):
      ...     combiner = Combiner("fixed", size=4)
      ...     return CombinerAttention(2, 8, combiner=combiner, rngs=nnx.Rngs(0))(x)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, in_features]
      >>> jax.eval_shape(model, x).shape
      (1, 6, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        combiner: Combiner | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """Makes the parameters; the class lists the arguments."""
        self.combiner = Combiner() if combiner is None else combiner
        super().__init__(
            self.combiner.spec(), num_heads, in_features, rngs=rngs, **options
        )
        dim = self.sizes.head_dim
        heads = self.sizes.num_q_heads, dim
        has = self.combiner
        self.phi = nnx.Linear(dim, dim, rngs=rngs) if has.has_phi else None
        self.proj = RowKeys(in_features, *heads, rngs=rngs) if has.has_proj else None

    def _given(self, x: Array) -> dict[str, Any]:
        made = super()._given(x)
        if self.phi is not None:
            phi = self.phi
            made[PHI] = lambda features: jax.nn.relu(phi(features))
        if self.proj is not None:
            made[PROJ] = partial(self.proj, x=x)
        return made


class _LinenRowKeys(linen.Module):
    """``RowKeys`` for Linen."""

    features: int
    num_heads: int
    head_dim: int

    @linen.compact
    def __call__(self, v: Array, x: Array) -> Array:
        linear = partial(linen.DenseGeneral, use_bias=False)
        mixed = linear(self.features, axis=(-2, -1), name="mix")(v)
        normed = linen.LayerNorm(name="norm")(x + mixed)
        return linear((self.num_heads, self.head_dim), name="out")(normed)


class LinenCombinerAttention(linen.Module):
    """Combiner self-attention for Flax Linen: every visible token has a weight.

    The parameters are those of ``CombinerAttention``, by name and shape. The fields are
    those of ``sadsl.layers.linen.SparseAttention``, with ``combiner`` for ``spec``.

    Example:
      >>> import jax
      >>> from sadsl.layers.combiner import Combiner, LinenCombinerAttention
      >>> layer = LinenCombinerAttention(2, Combiner("fixed", size=4))
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
      >>> y.shape, sorted(variables["params"])
      ((1, 6, 8), ['key', 'out', 'query', 'value'])
    """

    num_heads: int
    combiner: Combiner = Combiner()
    num_kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = False
    dtype: DTypeLike | None = None
    kernel_init: Callable[..., Any] = linen.initializers.lecun_normal()
    transform_qk: Callable[[Array, Array], tuple[Array, Array]] | None = None
    dropout_rate: float = 0.0
    impl: str | None = None
    config: KernelConfig | None = None

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "batch seq features"],
        *,
        operands: Mapping[str, Any] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "batch seq features"]:
        """Attends within ``x``."""
        features = x.shape[-1]
        dim = self.head_dim or features // self.num_heads
        made: dict[str, Any] = {}
        if self.combiner.has_phi:
            phi = linen.Dense(dim, name=PHI)
            made[PHI] = lambda array: jax.nn.relu(phi(array))
        if self.combiner.has_proj:
            keys = _LinenRowKeys(features, self.num_heads, dim, name=PROJ)
            made[PROJ] = partial(keys, x=x)
        inner = linen_layers.SparseAttention(
            self.combiner.spec(), self.num_heads, num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim, use_bias=self.use_bias, dtype=self.dtype,
            kernel_init=self.kernel_init, transform_qk=self.transform_qk,
            dropout_rate=self.dropout_rate, impl=self.impl, config=self.config,
        )  # fmt: skip
        # The parameters of `inner` get the names of this layer, without a prefix.
        linen.share_scope(self, inner)
        given = {**made, **(operands or {})}
        return inner(x, operands=given, deterministic=deterministic)
