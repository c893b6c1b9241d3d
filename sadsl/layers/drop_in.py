"""``attention_fn``: puts a spec in the place of Flax's dense attention function."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lowering import ir
from pallas_kernels.config import KernelConfig
from sadsl.maps.named import causal
from sadsl.run.call import attention
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec, Term
from sadsl.terms.linear import Linear
from sadsl.terms.scatter_mean import ScatterMean
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

# Arguments of Flax besides q, k and v that need the matrix of weights, and what to do
# instead. Any value but None is refused.
REFUSED: Mapping[str, str] = {
    "mask": "put the pattern into the spec; a cache (decode=True) passes its own mask, "
    "and is not supported",
    "bias": "leave bias out",
    "precision": "leave precision=None: products accumulate in float32",
    "module": "leave sow_weights=False: the weights are never stored",
    "einsum_dot_general": "leave it None",
    "qk_attn_weights_einsum": "leave qk_attn_weights_einsum_cls=None",
    "attn_weights_value_einsum": "leave attn_weights_value_einsum_cls=None",
}


@dataclass(frozen=True)
class AttentionFn:
    """A callable with the signature of Flax's ``dot_product_attention``, for one spec.

    Two are equal if their contents are, so two models built alike share one
    compilation.
    """

    term: Term
    sm_scale: float | None = None
    impl: str | None = None
    interpret: Any = False
    config: KernelConfig | None = None

    # Flax Linen passes only the arguments that the signature names, and drops
    # the others silently. So the signature names even those that are refused.
    def __call__(
        self,
        query: Float[Array, "*batch q_seq num_q_heads head_dim"],
        key: Float[Array, "*batch kv_seq num_kv_heads head_dim"],
        value: Float[Array, "*batch kv_seq num_kv_heads head_dim_v"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        **others: Any,
    ) -> Float[Array, "*batch q_seq num_q_heads head_dim_v"]:
        """Attends to the pairs of the spec; ``is_causal=True`` adds ``k <= q``.

        The softmax is in float32 whatever ``force_fp32_for_softmax`` says. Each batch
        entry and head drops its own weights, even if ``broadcast_dropout`` asks for one
        mask for all. For one key, ``sadsl.attention`` drops the same weights, Flax
        others.

        Raises:
          NotImplementedError: a mask, a bias, a precision, sown weights, an argument
            that this function does not know, or ``is_causal=True`` with a mixture.
          ValueError: the batch axes of query, key and value differ.
        """
        del broadcast_dropout, force_fp32_for_softmax
        asked = {"bias": bias, "mask": mask, "precision": precision, "module": module}
        asked["qk_attn_weights_einsum"] = qk_attn_weights_einsum
        asked["attn_weights_value_einsum"] = attn_weights_value_einsum
        for name, given in {**asked, **others}.items():
            if given is not None:
                _refuse(name, given, REFUSED.get(name, "leave it out"))
        rate = 0.0 if deterministic else dropout_rate
        batch = query.shape[:-3]
        for name, x in {"key": key, "value": value}.items():
            if x.shape[:-3] != batch:
                raise ValueError(
                    f"{name} has shape {x.shape}, query has {query.shape}: the axes in "
                    "front of [seq, heads, head_dim] must be the same"
                )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        q, k, v = (
            x.astype(dtype).reshape(math.prod(batch), *x.shape[-3:])
            for x in (query, key, value)
        )
        found = attention(
            q, k, v, _causal(self.term) if is_causal else self.term,
            sm_scale=self.sm_scale, impl=self.impl,
            interpret=self.interpret, config=self.config,
            dropout_rate=rate, dropout_key=dropout_rng if rate else None,
        )  # fmt: skip
        out = cast(Array, found)
        return out.reshape(*batch, *out.shape[1:])


def _causal(term: Term) -> Softmax:
    if isinstance(term, Softmax):
        return replace(term, map=term.map & causal())
    raise NotImplementedError(
        f"is_causal=True with spec={term!r}, which is not one softmax over a map: "
        "leave is_causal=False, and put causal() into its parts"
    )


def _refuse(name: str, given: Any, way_out: str) -> NoReturn:
    shape = getattr(given, "shape", None)
    shown = repr(given) if shape is None else f"an array of shape {tuple(shape)}"
    shown = shown if len(shown) < 80 else f"a {type(given).__name__}"
    raise NotImplementedError(
        f"{name}={shown}: a sparse attention function never holds the matrix of "
        f"weights, so it cannot honour {name}; {way_out}"
    )


def attention_fn(
    spec: Spec | str,
    *,
    sm_scale: float | None = None,
    impl: str | None = None,
    interpret: Any = False,
    config: KernelConfig | None = None,
) -> AttentionFn:
    """Makes the ``attention_fn`` of ``nnx.MultiHeadAttention``, or of its Linen form.

    The function takes ``[batch..., seq, heads, head_dim]`` with any number of batch
    axes. It raises ``NotImplementedError`` where it is asked for what it cannot honour,
    such as a mask.

    Args:
      spec: an index map, a term, or text, which is read here, once.
      sm_scale, impl, interpret, config: as in ``sadsl.attention``.

    Raises:
      ValueError: the text is not a spec, or the spec reads run-time arrays, learned
        ones among them.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers import attention_fn
      >>> near = attention_fn("causal() & window(2)")
      >>> def model(x):
      ...     layer = nnx.MultiHeadAttention(
      ...         2, 8, attention_fn=near, decode=False, rngs=nnx.Rngs(0)
      ...     )
      ...     return layer(x)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> jax.eval_shape(model, x).shape
      (1, 6, 8)
    """
    term = any_term(spec)
    names = sorted(needed(term))
    if names:
        raise ValueError(
            f"spec={term!r} reads the run-time arrays {names}, which Flax's attention "
            "layers cannot pass on: use SparseAttention of sadsl.layers.nnx or .linen"
        )
    return AttentionFn(term, sm_scale, impl, interpret, config)


def needed(spec: Spec) -> set[str]:
    """Names of the run-time arrays that a call with ``spec`` must be given."""
    if isinstance(spec, ScatterMean):
        return needed(spec.map)
    if isinstance(spec, Linear) and spec.named_features is not None:
        return {spec.named_features, *spec.operands}
    if isinstance(spec, Term):
        return set(spec.operands).union(*map(needed, spec.parts))
    chosen = selections_of(spec)
    read = {
        n for n in ir.operand_names(spec.node) if not any(s.owns(n) for s in chosen)
    }
    return read.union(*(s.operands for s in chosen))
