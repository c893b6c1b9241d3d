"""A softmax over the keys so far for each key channel, as keys and log-decays.

With ``z_t = logsumexp_(s <= t) k_s`` by channel, the state ``sum_s exp(k_s - z_t) v_s``
is a recurrence: its keys are ``exp(k_t - z_t)`` and its log-decays ``z_(t-1) - z_t``
(Qin et al., You Only Scan Once: LightNet, 2024).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.precision import wide


def running_softmax(
    logits: Float[Array, "batch seq heads features"],
    starts: Bool[Array, "batch seq"] | None,
    before: Float[Array, "batch heads 1 features"] | None,
) -> tuple[Array, Array, Array]:
    """Keys, log-decays ``[batch, heads, seq, features]``, and the last ``z``.

    Where ``starts`` is true the sum starts anew. ``before`` is the last ``z`` of
    earlier tokens; the result has its shape.
    """
    k = jnp.swapaxes(logits, 1, 2).astype(wide(logits.dtype))
    fresh = jnp.zeros(k.shape[:3], bool)
    if starts is not None:
        fresh |= starts[:, None]
    first = jnp.full_like(k[:, :, :1], -jnp.inf) if before is None else before
    joined = jnp.concatenate([first.astype(k.dtype), k], axis=2)
    reset = jnp.concatenate([jnp.zeros_like(fresh[..., :1]), fresh], axis=2)[..., None]

    def later(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (past, passed), (own, started) = a, b
        return jnp.where(started, own, jnp.logaddexp(past, own)), passed | started

    z, _ = jax.lax.associative_scan(later, (joined, reset), axis=2)
    past, now = z[:, :, :-1], z[:, :, 1:]
    # Nothing is kept where the sum starts anew or no key was seen, whatever the decay.
    fresh = fresh[..., None] | (past == -jnp.inf)
    decay = jnp.where(fresh, now, past) - now
    keys = jnp.exp(k - now).astype(logits.dtype)
    return jnp.swapaxes(keys, 1, 2), decay, now[:, :, -1:]
