"""Delta rules: DeltaNet and what grew out of it, up to RWKV-7 and Kimi Linear."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.maps.base import IndexMap
from sadsl.terms.delta import Delta, delta


def delta_net(map: IndexMap | None = None) -> Delta:
    """DeltaNet: a key replaces what the state holds for it.

    Yang et al., Parallelizing linear transformers with the delta rule over sequence
    length, 2024, section 2. The operand "beta" ``[batch, seq, heads]`` holds
    ``sigmoid(x W)``.

    Args:
      map: as in ``sadsl.delta``.

    Example:
      >>> from sadsl import catalog
      >>> catalog.delta_net()
      delta()
    """
    return delta(map=map)


def gated_delta_net(map: IndexMap | None = None) -> Delta:
    """Gated DeltaNet: the delta rule with a decay for each head and token.

    Yang, Kautz, Hatamizadeh, Gated delta networks: improving Mamba2 with delta rule,
    2024, section 3; the linear layers of Qwen3-Next, Qwen3.5 and OLMo-Hybrid. Operands:
    "beta" and "g", both ``[batch, seq, value heads]``.

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.gated_delta_net()
      delta(decay='g')
    """
    return delta("beta", "g", map=map)


def kimi_delta(map: IndexMap | None = None) -> Delta:
    """Kimi delta attention: the delta rule with a decay for each channel and token.

    Kimi Team, Kimi Linear: an expressive, efficient attention architecture, 2025,
    section 3; also in Ling-3. Operands: "beta" ``[batch, seq, heads]`` and "g"
    ``[batch, seq, heads, head_dim]``.

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.kimi_delta()
      delta(decay='g', by='channel')
    """
    return delta("beta", "g", by="channel", map=map)


def gated_delta_product(steps: int = 2, map: IndexMap | None = None) -> Delta:
    """Gated DeltaProduct: several delta steps a token, after one decay.

    Siems et al., DeltaProduct: improving state-tracking in linear RNNs via Householder
    products, 2025, section 3. Keys, values and the operand "beta" have ``steps`` times
    as many positions as queries and the operand "g".

    Args:
      steps: keys that a token writes.
      map: a causal map; ``causal()`` if None.

    Raises:
      ValueError: ``steps`` is less than 1.

    Example:
      >>> from sadsl import catalog
      >>> catalog.gated_delta_product(3)
      delta(decay='g', steps=3)
    """
    return delta("beta", "g", steps=steps, map=map)


def comba(map: IndexMap | None = None) -> Delta:
    """Comba: the vector that reads what is taken away differs from the key.

    Hu et al., Comba: improving bilinear RNNs with closed-loop control, 2025: ``S <- S +
    beta k (v - S^T p)^T`` after a decay by head. Operands: "p" ``[batch, seq, heads,
    head_dim]``, "beta" and "g" ``[batch, seq, heads]``. (The recurrence is that of
    flash-linear-attention's reference; the paper was not read. How p comes from the key
    is left to the caller.)

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.comba()
      delta(decay='g', erase='p')
    """
    return delta("beta", "g", erase="p", map=map)


def rwkv7(map: IndexMap | None = None) -> Delta:
    """RWKV-7: a diagonal plus a matrix of rank one, both from the input.

    Peng et al., RWKV-7 "Goose" with expressive dynamic state evolution, 2025, section
    3: ``S <- (diag(exp(g)) + b a^T) S + k v^T``, where ``a`` is the normalised key to
    remove, negated, and ``b`` is that key times a learning rate for each channel.
    Operands: "a", "b" and "g", each ``[batch, seq, heads, head_dim]``. Queries are not
    scaled there: pass ``sm_scale=1.0`` to the call.

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> import sadsl as sa
      >>> from sadsl import catalog
      >>> sorted(catalog.rwkv7().operands)
      ['a', 'b', 'g']
    """
    return delta(
        None, "g", by="channel", erase="a", write="b", normalise_keys=False, map=map
    )


def precond_kda(map: IndexMap | None = None) -> Delta:
    """Kimi delta attention that writes with preconditioned keys.

    ``S <- S + beta w (v - S^T k)^T`` after a decay by channel, where ``w`` is k made
    smaller where a channel has been large. Pass ``w`` as the keys of the call, and k as
    the operand "erase"; ``preconditioned_keys`` computes ``w``. Other operands are
    those of ``kimi_delta``. Normalise q and k before. (The recurrence is that of
    flash-linear-attention's reference; no paper was read.)

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.precond_kda()
      delta(decay='g', by='channel', erase='erase', normalise_keys=False)
    """
    return delta(
        "beta", "g", by="channel", erase="erase", normalise_keys=False, map=map
    )


def preconditioned_keys(
    k: Float[Array, "batch seq heads dim"],
    log_decay: Float[Array, "batch seq heads"],
    weight: Float[Array, "batch seq heads"],
    *,
    size: Float[Array, "batch heads dim"] | None = None,
    base: float = 1.5,
    eps: float = 1e-6,
    log_scale: float = -0.2,
) -> tuple[Array, Array]:
    """The keys that ``precond_kda`` writes with.

    A running size of each channel, ``a <- exp(log_decay) a + weight k ** 2``, divides a
    key by a power of ``base`` between -1 and 1: ``k * base ** (-r / (1 + |r|))`` with
    ``r = log(a + eps) - log_scale``. Only products and sums of positive numbers, in
    time ``O(log seq)`` on parallel hardware.

    Args:
      k: normalised keys.
      log_decay: of the running size, at most 0.
      weight: how much a key adds to the size, at least 0.
      size: the running size before the first token; 0 if None.
      base, eps, log_scale: constants; those of flash-linear-attention's reference.

    Returns:
      The keys, and the running size after the last token, float32.

    Raises:
      ValueError: ``base`` is below 1, or ``eps`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl import catalog
      >>> k, zero = jnp.ones((1, 2, 1, 1)), jnp.zeros((1, 2, 1))
      >>> keys, size = catalog.preconditioned_keys(k, zero, zero + 1)
      >>> keys[0, :, 0, 0].round(2).tolist(), float(size[0, 0, 0])
      ([0.9300000071525574, 0.8299999833106995], 2.0)
    """
    if not base >= 1 or not eps > 0:
        raise ValueError(f"base={base} must be at least 1, and eps={eps} above 0")
    wide = widened(k)
    keep = jnp.broadcast_to(jnp.exp(widened(log_decay))[..., None], wide.shape)
    added = widened(weight)[..., None] * wide * wide
    if size is not None:
        added = added.at[:, 0].add(keep[:, 0] * widened(size))

    def then(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] * b[0], b[0] * a[1] + b[1]

    _, sizes = jax.lax.associative_scan(then, (keep, added), axis=1)
    r = jnp.log(sizes + eps) - log_scale
    keys = wide * jnp.power(base, -r / (1 + jnp.abs(r)))
    return keys.astype(k.dtype), sizes[:, -1]
