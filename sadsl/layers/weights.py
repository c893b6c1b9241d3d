"""Flax's own attention layers as sparse ones with the same weights, and back.

The parameters of both have the same names and shapes. So a checkpoint of one serves the
other as it is: with Linen the variables, with NNX ``nnx.update(layer,
nnx.state(flax_layer, nnx.Param))``. The functions here also take over the sizes, and
refuse what the other layer cannot say.
"""

from typing import Any

from flax import linen, nnx

from sadsl.layers import linen as sparse_linen
from sadsl.layers import nnx as sparse_nnx
from sadsl.layers.drop_in import attention_fn
from sadsl.layers.stack import Specs, of_layer
from sadsl.layers.transforms import (
    PROJECTIONS,
    HeadTransforms,
    QKNorm,
    with_bias,
)
from sadsl.maps.named import full
from sadsl.terms.base import LayerSizes, Term
from sadsl.terms.softmax import softmax

# What Flax's ``normalize_qk=True`` does.
FLAX_NORM = HeadTransforms(qk_norm=QKNorm("layer", bias=False))
# Fields of Flax's layers that say how arrays are multiplied: ours have no such fields.
PRODUCTS = (
    "precision", "qkv_dot_general", "out_dot_general", "qkv_dot_general_cls",
    "out_dot_general_cls", "qk_attn_weights_einsum_cls",
    "attn_weights_value_einsum_cls",
)  # fmt: skip

INITS = "kernel_init", "out_kernel_init", "bias_init", "out_bias_init"


def from_flax(
    attention: nnx.MultiHeadAttention | linen.MultiHeadDotProductAttention,
    spec: Specs,
    **options: Any,
) -> sparse_nnx.SparseAttention | sparse_linen.SparseAttention:
    """The sparse layer with the sizes of Flax's, and with its weights.

    A Linen module has no weights: the variables of the one are those of the other. With
    ``spec="full()"`` both give the same outputs. Dropout, if any, draws other weights:
    Flax drops the same ones in the whole batch.

    Args:
      attention: Flax's layer, of either API.
      spec: as in ``SparseAttention``.
      options: further arguments of ``SparseAttention``.

    Raises:
      TypeError: ``attention`` is no attention layer of Flax.
      ValueError: it multiplies in a way that ``SparseAttention`` has no word for, or
        its function of attention is not Flax's default.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from sadsl.layers.weights import from_flax
      >>> def same(x):
      ...     flax = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      ...     return jnp.abs(flax(x) - from_flax(flax, "full()")(x)).max()
      >>> bool(jax.jit(same)(jnp.ones((1, 6, 8))) < 1e-6)
      True
    """
    match attention:
        case nnx.MultiHeadAttention():
            _check_flax(attention, nnx.dot_product_attention)
            return _from_nnx(attention, spec, options)
        case linen.MultiHeadDotProductAttention():
            _check_flax(attention, linen.dot_product_attention)
            return _from_linen(attention, spec, options)
    raise TypeError(
        "from_flax takes nnx.MultiHeadAttention or linen.MultiHeadDotProductAttention, "
        f"not {type(attention).__name__}"
    )


def to_flax(
    layer: sparse_nnx.SparseAttention | sparse_linen.SparseAttention, **options: Any
) -> nnx.MultiHeadAttention | linen.MultiHeadDotProductAttention:
    """Flax's layer with the sizes of a sparse one, and with its weights.

    It attends by ``attention_fn`` of the spec, or as Flax does if the spec is
    ``full()``; ``attention_fn=`` among the options goes first. The variables of a Linen
    layer serve as they are.

    Args:
      layer: a sparse layer of either API.
      options: further arguments of Flax's layer, such as ``decode``.

    Raises:
      TypeError: ``layer`` is no ``SparseAttention``.
      ValueError: Flax's layer has no word for a part of it.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import SparseAttention
      >>> from sadsl.layers.weights import to_flax
      >>> def flax(x):
      ...     layer = SparseAttention("causal()", 2, 8, rngs=nnx.Rngs(0))
      ...     return to_flax(layer, decode=False)(x)
      >>> jax.eval_shape(flax, jax.ShapeDtypeStruct((1, 6, 8), "float32")).shape
      (1, 6, 8)
    """
    match layer:
        case sparse_nnx.SparseAttention():
            return _to_nnx(layer, options)
        case sparse_linen.SparseAttention():
            return _to_linen(layer, options)
    raise TypeError(f"to_flax takes SparseAttention, not {type(layer).__name__}")


def _from_nnx(
    attention: nnx.MultiHeadAttention, spec: Specs, options: dict[str, Any]
) -> sparse_nnx.SparseAttention:
    names = "in_features", "in_kv_features", "num_kv_heads", "head_dim"
    mine = {name: getattr(attention, name) for name in names} | _shared(attention)
    rngs = options.pop("rngs", nnx.Rngs(0))
    layer = sparse_nnx.SparseAttention(
        spec, attention.num_heads, rngs=rngs, **{**mine, **options}
    )
    nnx.update(layer, nnx.state(attention, nnx.Param))
    if attention.deterministic is not None:
        layer.deterministic = attention.deterministic
    return layer


def _from_linen(
    attention: linen.MultiHeadDotProductAttention, spec: Specs, options: dict[str, Any]
) -> sparse_linen.SparseAttention:
    width, heads = attention.qkv_features, attention.num_heads
    names = *INITS, "deterministic"
    mine = {name: getattr(attention, name) for name in names} | _shared(attention)
    mine["head_dim"] = None if width is None else width // heads
    return sparse_linen.SparseAttention(spec, heads, **{**mine, **options})


def _shared(attention: Any) -> dict[str, Any]:
    """The arguments that both APIs have."""
    names = "out_features", "use_bias", "dtype", "param_dtype", "dropout_rate"
    transforms = FLAX_NORM if attention.normalize_qk else HeadTransforms()
    return {name: getattr(attention, name) for name in names} | {
        "transforms": transforms
    }


def _to_nnx(
    layer: sparse_nnx.SparseAttention, options: dict[str, Any]
) -> nnx.MultiHeadAttention:
    sizes, query = layer.sizes, layer.query
    projections = layer.query, layer.key, layer.value, layer.out
    biased = {each.use_bias for each in projections if each is not None}
    _check_sparse(layer, layer.term, sizes, biased)
    rngs = options.pop("rngs", nnx.Rngs(0))
    mine: dict[str, Any] = {
        "qkv_features": sizes.num_q_heads * sizes.head_dim,
        "out_features": layer.out.out_features[0],
        "num_kv_heads": sizes.num_kv_heads,
        "in_kv_features": layer.in_kv_features,
        "dtype": query.dtype,
        "param_dtype": query.param_dtype,
        "dropout_rate": layer.dropout_rate,
        "deterministic": layer.deterministic,
        "use_bias": query.use_bias,
        "normalize_qk": layer.transforms == FLAX_NORM,
        "attention_fn": _function(layer.term, nnx.dot_product_attention),
        # All parameters are replaced.
        "kernel_init": nnx.initializers.zeros_init(),
    }
    found = nnx.MultiHeadAttention(
        sizes.num_q_heads, layer.in_features, rngs=rngs, **{**mine, **options}
    )
    nnx.update(found, nnx.state(layer, nnx.Param))
    return found


def _to_linen(
    layer: sparse_linen.SparseAttention, options: dict[str, Any]
) -> linen.MultiHeadDotProductAttention:
    term, around = of_layer(layer.spec, layer.layer, layer.transforms)
    heads = layer.num_q_heads or layer.num_heads
    keys, dim = layer.num_kv_heads or heads, layer.head_dim
    if keys != heads or (dim is None and heads != layer.num_heads):
        raise ValueError(
            f"to_flax: num_heads={layer.num_heads}, num_q_heads={heads} and "
            f"num_kv_heads={keys}: Linen's layer has as many heads of keys as of "
            "queries; nnx.MultiHeadAttention may have fewer"
        )
    sizes = LayerSizes(heads, keys, dim or 1, dim or 1)
    names = with_bias(layer.use_bias, around)
    biased = {name in names for name in PROJECTIONS}
    _check_sparse(layer, term, sizes, biased)
    mine: dict[str, Any] = {
        "qkv_features": None if dim is None else heads * dim,
        "normalize_qk": around == FLAX_NORM,
        "attention_fn": _function(term, linen.dot_product_attention),
    }
    shared = "out_features", "dtype", "param_dtype", "dropout_rate", "deterministic"
    mine["use_bias"] = bool(names)
    mine |= {name: getattr(layer, name) for name in (*shared, *INITS)}
    return linen.MultiHeadDotProductAttention(heads, **{**mine, **options})


def _function(term: Term, own: Any) -> Any:
    return own if term == softmax(full()) else attention_fn(term)


def _check_flax(attention: Any, own: Any) -> None:
    for name in PRODUCTS:
        value = getattr(attention, name, None)
        if value is not None:
            raise ValueError(
                f"from_flax: {name}={value!r} has no counterpart in SparseAttention: "
                "build it yourself, and take over the weights with nnx.update"
            )
    if attention.attention_fn is not own:
        raise ValueError(
            f"from_flax: attention_fn={attention.attention_fn!r} would be lost: the "
            "sparse layer attends by its spec. Leave Flax's default"
        )


def _check_sparse(layer: Any, term: Term, sizes: LayerSizes, biased: set[bool]) -> None:
    learned = term.learned(sizes)
    problems = {
        f"transforms={layer.transforms!r}": layer.transforms
        not in (HeadTransforms(), FLAX_NORM),
        f"transform_qk={layer.transform_qk!r}": layer.transform_qk is not None,
        f"modules={layer.modules!r}": bool(layer.modules),
        f"the learned {', '.join(learned)} of {term!r}": bool(learned),
        "biases of some projections only": len(biased) > 1,
    }
    for what, found in problems.items():
        if found:
            raise ValueError(
                f"to_flax: {what} has no counterpart in Flax's attention layer: keep "
                "SparseAttention"
            )
