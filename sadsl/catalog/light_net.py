"""LightNet: each key channel takes a softmax over the tokens."""

from sadsl.maps.base import IndexMap
from sadsl.terms.linear import Linear, linear


def light_net(map: IndexMap | None = None) -> Linear:
    """Linear attention whose keys are divided by their running sum, channel by channel.

    Qin et al., You only scan once: efficient multi-dimension sequential modeling with
    LightNet, 2024. For channel ``c`` of the keys and the tokens ``j`` up to ``i``::

        S_i[c] = sum_j exp(k_j[c]) v_j / sum_j exp(k_j[c])
        o_i = d ** -0.5 q_i^T S_i

    Queries pass through SiLU before the call. Tokens of an image or a video need one
    scan, over any order of theirs: with ``map=full()`` the order changes nothing. (The
    form for both directions is a reconstruction, and so is the factor ``d ** -0.5``,
    which is that of flash-linear-attention. The published positional encodings are left
    out.)

    Args:
      map: ``causal()`` if None; ``full()`` for both directions; ``segments()``.

    Example:
      Equal keys weigh all tokens alike, so the output is the mean of the values:

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> from sadsl import catalog
      >>> q, v = jnp.ones((1, 3, 1, 1)), jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
      >>> out = sa.attention(q, 0 * q, v, catalog.light_net())
      >>> out[0, :, 0, 0].round(3).tolist()
      [1.0, 2.0, 4.0]
    """
    return linear("identity", map=map, normalise="channel", scaled=True)
