"""Dynamic mask attention: values say which keys are worth a look, and how much."""

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
    """The ``w`` keys up to the query with the highest bias: the operand ``bias``.

    Shi et al., Trainable dynamic mask sparse attention, 2025; the default is that of
    the Doge models. ``shared`` and ``smooth`` are options of the released code: see
    ``key_topw``.
    """
    return causal() & key_topw(w, shared=shared, smooth=smooth)


def value_bias(
    v: Float[Array, "batch seq kv_heads head_dim"],
    weight: Float[Array, "features kv_heads"],
    gain: Float[Array, " kv_heads"],
    form: str = "linear",
) -> Float[Array, "batch kv_heads seq"]:
    """``gain * softplus(v @ weight)`` for every key, float32.

    ``v`` is taken with its heads side by side, so that ``weight`` is ``[kv_heads *
    head_dim, kv_heads]``. ``form="exp"`` is the older ``exp(gain * softplus(...))``,
    which ranks keys alike for positive gains but adds another bias.

    Raises:
      ValueError: the weights do not fit the values, or there is no such form.
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
    """Attention over the chosen keys, with the bias that chose them in its scores.

    ``weights`` are ``(weight, gain)`` of ``value_bias``; their gradient comes from the
    bias of the keys that are seen, and not from the choice. ``spec`` is
    ``dynamic_mask()`` if None, or any map that reads the operand ``bias``; ``options``
    are those of ``attention``.
    """
    # The choice takes a score a key head, the bias a number a query head.
    bias = value_bias(v, *weights, form)
    bias = jnp.repeat(bias, q.shape[2] // k.shape[2], axis=1)
    chosen = dynamic_mask() if spec is None else spec
    operands = {**(options.pop("operands", None) or {}), "bias": bias}
    term = softmax(chosen, bias=key_bias("bias"))
    return attention(q, k, v, term, operands=operands, **options)
