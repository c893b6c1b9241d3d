"""``entries``: pools consecutive tokens into one vector each, for ``over``."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import widened


def entries(
    x: Float[Array, "batch seq *heads channels"],
    logits: Float[Array, "batch seq *heads channels"] | None = None,
    *,
    length: int,
    position_bias: Float[Array, "length *heads channels"] | None = None,
    overlap: bool = False,
) -> Float[Array, "batch entries *heads dim"]:
    """Pools each ``length`` tokens into one entry.

    The weights are a softmax over the tokens of ``logits + position_bias``, for each
    channel by itself; the mean without logits. Tokens at the end that do not fill a
    window have no entry. Sums are in float32, or float64.

    With ``overlap``, the channels are two halves, ``[a | b]``. Entry ``j`` pools ``2 *
    length`` rows: the a-halves of window ``j - 1`` and the b-halves of window ``j``;
    the first entry has its own window only (DeepSeek-AI, DeepSeek-V4, 2026).

    Args:
      x: what is pooled.
      logits: like ``x``.
      length: the tokens in a window.
      position_bias: added to the logits of each place in a window.
      overlap: see above.

    Raises:
      ValueError: the shapes do not fit together, or ``length`` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> entries(jnp.arange(5.0)[None, :, None], length=2)[0, :, 0].tolist()
      [0.5, 2.5]
    """
    if length < 1:
        raise ValueError(f"entries: length={length} must be at least 1")
    if logits is not None and logits.shape != x.shape:
        raise ValueError(
            f"entries: logits have shape {logits.shape}, x has {x.shape}: must be equal"
        )
    if overlap and x.shape[-1] % 2:
        raise ValueError(
            f"entries: x has {x.shape[-1]} channels: with overlap, two halves"
        )
    wanted = (length, *x.shape[2:])
    if position_bias is not None and position_bias.shape != wanted:
        raise ValueError(
            f"entries: position_bias has shape {position_bias.shape}: must be {wanted}"
        )
    values = _windows(widened(x), length)
    scores = jnp.zeros_like(values)
    if logits is not None:
        scores = _windows(widened(logits), length)
    if position_bias is not None:
        scores = scores + widened(position_bias)[None, None]
    if overlap:
        values, scores = _overlapped(values, 0.0), _overlapped(scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=2)
    return jnp.sum(weights * values, axis=2).astype(x.dtype)


def _windows(x: Array, length: int) -> Float[Array, "batch windows length ..."]:
    count = x.shape[1] // length
    return x[:, : count * length].reshape(len(x), count, length, *x.shape[2:])


def _overlapped(x: Array, fill: float) -> Float[Array, "batch windows two_lengths ..."]:
    """The a-halves of the window before, then the b-halves of each window."""
    before, own = jnp.split(x, 2, axis=-1)
    first = jnp.full_like(before[:, :1], fill)
    before = jnp.concatenate([first, before[:, :-1]], axis=1)
    return jnp.concatenate([before, own], axis=2)
