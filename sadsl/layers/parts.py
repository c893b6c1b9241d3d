"""What surrounds a linear recurrence in a layer: convolution, gates, output norm.

Pure functions of arrays, which the layers of both Flax APIs share. They compute in
float32 (float64 for float64). Gates stay in that width, the rest returns to the dtype
of ``x``.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from pallas_kernels.precision import widened

Activation: TypeAlias = Literal["silu", "sigmoid"]
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


def short_convolution(
    x: Float[Array, "batch seq channels"],
    weight: Float[Array, "channels width"],
    *,
    before: Float[Array, "batch past channels"] | None = None,
    segment_ids: Integer[Array, "batch seq"] | None = None,
    activation: Activation | None = "silu",
) -> tuple[Array, Array]:
    """Mixes each channel of a token with its last ``width - 1`` predecessors.

    ``y[t] = silu(sum_i weight[:, i] x[t - (width - 1) + i])``: causal, by channel,
    without bias (Yang et al., Gated delta networks, 2024, section 3.4, as in Mamba).

    Args:
      x: the inputs.
      weight: the factor of the token itself is the last.
      before: the ``width - 1`` inputs before the first, as a call returns them; zeros
        if None. They are taken to belong to the document of the first token.
      segment_ids: a token mixes only with neighbours of its own document.
      activation: what follows; None for nothing.

    Returns:
      The outputs, and the last ``width - 1`` inputs, to go on with. Inputs of other
      documents than the last one's are 0 there.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.parts import short_convolution
      >>> x = jnp.arange(4.0).reshape(1, 4, 1)
      >>> y, last = short_convolution(x, jnp.array([[1.0, 10.0]]), activation=None)
      >>> y[0, :, 0].tolist(), last[0, :, 0].tolist()
      ([0.0, 10.0, 21.0, 32.0], [3.0])
    """
    batch, seq, channels = x.shape
    past = weight.shape[-1] - 1
    if before is None:
        before = jnp.zeros((batch, past, channels), x.dtype)
    whole = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    piece = None if segment_ids is None else _pieces(segment_ids, past)
    factors = widened(weight)
    total = jnp.zeros(x.shape, factors.dtype)
    for i in range(past + 1):
        tap = widened(whole[:, i : i + seq])
        if piece is not None:
            tap = _where(piece[:, i : i + seq] == piece[:, past:], tap)
        total += tap * factors[:, i][None, None]
    last = whole[:, seq:]
    if piece is not None:
        last = _where(piece[:, seq:] == piece[:, -1:], last)
    return _activated(total, activation).astype(x.dtype), last


def _pieces(ids: Array, past: int) -> Array:
    """Number of the piece of each token, from 0; ``past`` more tokens in the first."""
    new = ids[:, 1:] != ids[:, :-1]
    counted = jnp.cumsum(new, axis=1, dtype=jnp.int32)
    return jnp.pad(counted, ((0, 0), (past + 1, 0)))


def _where(kept: Bool[Array, "batch seq"], x: Array) -> Array:
    return jnp.where(kept[:, :, None], x, 0)


def _activated(x: Array, activation: str | None) -> Array:
    return x if activation is None else ACTIVATIONS[activation](x)


def decay_gate(
    x: Float[Array, "..."],
    a_log: Float[Array, " heads"],
    dt_bias: Float[Array, "..."],
    lower: float | None = None,
) -> Float[Array, "..."]:
    """Log-decays from projections ``x``: ``-exp(a_log) softplus(x + dt_bias)``.

    By head (Yang et al., Gated delta networks, 2024, section 3.4; Dao, Gu, Transformers
    are SSMs, 2024), or by channel (Kimi Team, Kimi Linear, 2025, section 4). With
    ``lower`` they are bounded: ``lower * sigmoid(exp(a_log) (x + dt_bias))``.

    Args:
      x: ``[batch, seq, heads]``, or ``[batch, seq, heads, channels]``.
      a_log: the logarithm of the rate of each head.
      dt_bias: ``[heads]`` or ``[heads, channels]``, as the last axes of ``x``.
      lower: the least log-decay, below 0, such as -5; None for no bound.

    Raises:
      ValueError: ``lower`` is not below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.parts import decay_gate
      >>> zero = jnp.zeros((1, 1, 2))  # softplus(0) is ln 2
      >>> round(float(decay_gate(zero, jnp.zeros(2), jnp.zeros(2))[0, 0, 0]), 4)
      -0.6931
      >>> decay_gate(zero, jnp.zeros(2), jnp.zeros(2), lower=-5.0)[0, 0].tolist()
      [-2.5, -2.5]
    """
    if lower is not None and not lower < 0:
        raise ValueError(
            f"lower={lower} must be below 0: it is the least log-decay of a step; use "
            "None for no bound"
        )
    rate = jnp.exp(widened(a_log))
    rate = rate.reshape(1, 1, -1, *[1] * (x.ndim - 3))
    x = widened(x) + widened(dt_bias)[None, None]
    if lower is None:
        return -rate * jax.nn.softplus(x)
    return lower * jax.nn.sigmoid(rate * x)


def slow_decay(x: Float[Array, "..."], temperature: float = 16.0) -> Array:
    """Log-decays ``log_sigmoid(x) / temperature``, so that a state first lasts.

    Yang et al., Gated linear attention transformers, 2024, section 4.4.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.parts import slow_decay
      >>> round(float(jnp.exp(slow_decay(jnp.zeros(())))), 3)
      0.958
    """
    return jax.nn.log_sigmoid(widened(x)) / temperature


def write_strength(x: Float[Array, "..."], *, negative: bool = False) -> Array:
    """Betas of the delta rule: ``sigmoid(x)``, or ``2 sigmoid(x)``.

    Above 1 the state has negative eigenvalues, which tracking needs (Grazzi et al.,
    Unlocking state-tracking in linear RNNs through negative eigenvalues, 2024).

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.parts import write_strength
      >>> float(write_strength(jnp.zeros(()))), float(
      ...     write_strength(jnp.zeros(()), negative=True))
      (0.5, 1.0)
    """
    return jax.nn.sigmoid(widened(x)) * (2.0 if negative else 1.0)


def hgrn2_gates(f: Float[Array, "..."], lower: float = 0.0) -> tuple[Array, Array]:
    """Log-decays and keys of HGRN2: a channel writes what it forgets.

    ``exp(g) = lower + (1 - lower) sigmoid(f)`` and ``k = 1 - exp(g)`` (Qin et al.,
    HGRN2: gated linear RNNs with state expansion, 2024, section 3).

    Args:
      f: projections, one for each key channel.
      lower: what a channel keeps at least, in [0, 1); it may grow with the layer.

    Raises:
      ValueError: ``lower`` is not in [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.parts import hgrn2_gates
      >>> g, k = hgrn2_gates(jnp.zeros(()))
      >>> round(float(g), 4), float(k)
      (-0.6931, 0.5)
    """
    if not 0 <= lower < 1:
        raise ValueError(f"lower={lower} must be in [0, 1): the share that is kept")
    f = widened(f)
    # Not 1 - exp(g), which cancels where nearly all is kept.
    k = (1 - lower) * jax.nn.sigmoid(-f)
    return (jax.nn.log_sigmoid(f) if lower == 0 else jnp.log1p(-k)), k


def gated_rms_norm(
    x: Float[Array, "..."],
    weight: Float[Array, " channels"],
    gate: Float[Array, "..."] | None = None,
    *,
    activation: Activation = "silu",
    eps: float = 1e-6,
    group: int | None = None,
    gate_first: bool = False,
) -> Array:
    """``x / sqrt(mean(x ** 2) + eps) * weight * silu(gate)``, over the last axis.

    Args:
      x: outputs of the recurrence, ``[..., channels]``; often one row for each head.
      weight: one for each channel.
      gate: logits shaped like ``x``; None for no gate.
      activation: of the gate; SiLU in gated delta networks, sigmoid in Kimi Linear.
      eps: added to the mean square.
      group: channels of a group, which divides the channels; each group has its own
        mean. One group if None.
      gate_first: whether the gate goes before the norm (Dao, Gu, Transformers are SSMs,
        2024, section 7.1, Mamba-2).

    Raises:
      ValueError: ``group`` does not divide the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.parts import gated_rms_norm
      >>> gated_rms_norm(jnp.array([3.0, -3.0]), jnp.ones(2)).round(3).tolist()
      [1.0, -1.0]
    """
    channels = x.shape[-1]
    size = channels if group is None else group
    if size < 1 or channels % size:
        raise ValueError(f"group={group} must divide the {channels} channels")
    y = widened(x)
    opened = None if gate is None else ACTIVATIONS[activation](widened(gate))
    if opened is not None and gate_first:
        y = y * opened
    parts = y.reshape(*y.shape[:-1], -1, size)
    square = jnp.mean(parts * parts, axis=-1, keepdims=True)
    y = (parts * jax.lax.rsqrt(square + eps)).reshape(y.shape)
    y = y * widened(weight).reshape(*[1] * (y.ndim - 1), -1)
    if opened is not None and not gate_first:
        y = y * opened
    return y.astype(x.dtype)
