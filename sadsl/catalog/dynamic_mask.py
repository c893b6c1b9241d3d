"""Dynamic mask attention: a bias made from the values chooses keys and weighs them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal
from sadsl.run.call import attention
from sadsl.selections.key_topw import key_topw
from sadsl.terms.biases import key_bias
from sadsl.terms.softmax import softmax

FORMS = ("linear", "exp")


def dynamic_mask(
    w: int = 2048, *, shared: bool = False, smooth: int | None = None
) -> IndexMap:
    """A query sees the ``w`` keys up to its position with the highest bias.

    Shi et al., Trainable dynamic mask sparse attention, 2025; the default is that of
    the Doge models. The bias is the operand ``bias``.

    Args:
      w: keys that a query sees.
      shared, smooth: options of the released code; see ``key_topw``.

    Example:
      >>> from sadsl import catalog
      >>> catalog.dynamic_mask(64)
      causal() & key_topw(64)
    """
    return causal() & key_topw(w, shared=shared, smooth=smooth)


def value_bias(
    v: Float[Array, "batch seq kv_heads head_dim"],
    weight: Float[Array, "features kv_heads"],
    gain: Float[Array, " kv_heads"],
    form: str = "linear",
) -> Float[Array, "batch kv_heads seq"]:
    """Computes the bias of each key from its value: ``gain * softplus(v @ weight)``.

    Shi et al., Trainable dynamic mask sparse attention, 2025.

    Args:
      v: values; their heads are laid side by side before the product.
      weight: ``[kv_heads * head_dim, kv_heads]``.
      gain: a factor for each head.
      form: "linear" as above, or the older "exp", ``exp(gain * softplus(...))``. Both
        rank keys alike where gains are positive, but the bias that they add differs.

    Returns:
      The bias, float32.

    Raises:
      ValueError: the weights do not fit the values, or there is no such form.

    Example:
      >>> import jax
      >>> from sadsl import catalog
      >>> shapes = (1, 3, 2, 4), (8, 2), (2,)
      >>> arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
      >>> jax.eval_shape(catalog.value_bias, *arrays).shape
      (1, 2, 3)
    """
    batch, length, heads, head_dim = v.shape
    shapes = {"weight": (heads * head_dim, heads), "gain": (heads,)}
    for name, x in {"weight": weight, "gain": gain}.items():
        if x.shape != shapes[name]:
            raise ValueError(
                f"{name} has shape {x.shape}: for values of {heads} heads and "
                f"head_dim {head_dim} it must be {shapes[name]}"
            )
    if form not in FORMS:
        raise ValueError(f"value_bias: form={form!r} must be one of {FORMS}")
    wide = v.reshape(batch, length, heads * head_dim).astype(jnp.float32)
    step = jnp.matmul(wide, weight.astype(jnp.float32), precision="highest")
    bias = jax.nn.softplus(step) * gain.astype(jnp.float32)[None, None]
    return jnp.swapaxes(jnp.exp(bias) if form == "exp" else bias, 1, 2)


def dynamic_mask_attention(
    q: Float[Array, "batch seq num_q_heads head_dim"],
    k: Float[Array, "batch seq num_kv_heads head_dim"],
    v: Float[Array, "batch seq num_kv_heads head_dim_v"],
    weights: tuple[Array, Array],
    spec: IndexMap | None = None,
    *,
    form: str = "linear",
    **options: Any,
) -> Any:
    """Attends to the keys of highest ``value_bias``, and adds that bias to the scores.

    Shi et al., Trainable dynamic mask sparse attention, 2025. The gradient of
    ``weights`` comes from the bias of the visible keys, not from the choice of keys.

    Args:
      q, k, v: as in ``sadsl.attention``.
      weights: ``(weight, gain)`` of ``value_bias``.
      spec: ``dynamic_mask()`` if None, or any map that reads the operand ``bias``.
      form: of ``value_bias``.
      **options: those of ``sadsl.attention``.

    Returns:
      What ``sadsl.attention`` returns.

    Example:
      >>> from functools import partial
      >>> import jax
      >>> from sadsl import catalog
      >>> shapes = (1, 6, 2, 4), (8, 2), (2,)
      >>> x, *weights = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
      >>> attend = partial(catalog.dynamic_mask_attention, spec=catalog.dynamic_mask(3))
      >>> jax.eval_shape(attend, x, x, x, tuple(weights)).shape
      (1, 6, 2, 4)
    """
    # key_topw takes one score for each key head, key_bias one for each query head.
    bias = value_bias(v, *weights, form)
    bias = jnp.repeat(bias, q.shape[2] // k.shape[2], axis=1)
    chosen = dynamic_mask() if spec is None else spec
    operands = {**(options.pop("operands", None) or {}), "bias": bias}
    term = softmax(chosen, bias=key_bias("bias"))
    return attention(q, k, v, term, operands=operands, **options)
