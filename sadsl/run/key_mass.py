"""``key_mass``: how much weight listed keys have, for losses that train a choice."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import wide, widened
from sadsl.run import checks

# A strip of queries gathers at most so many keys.
MOST_KEYS = 1 << 14


def key_mass(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "*batch_or_1 kv_seq num_kv_heads head_dim"],
    lse: Float[Array, "batch num_q_heads q_seq"],
    listed: Int[Array, "batch_or_1 groups q_seq keys"],
    *,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    detach: bool = True,
) -> Float[Array, "batch groups q_seq keys"]:
    """The attention weight of listed keys, added up over the query heads of a group.

    The weights are those of the call that returned ``lse`` (``return_lse=True``), so
    they are right for every backend and for every term with one normaliser: a sink, or
    other parts of a ``joint``, have their share in it. A separate function needs no
    flag in any kernel. It reads the listed keys once more.

    For a part ``over(...)`` of a joint, ``k`` are its entries and ``lse`` is that of
    the joint: the result is the weight that entries have beside tokens and sinks.

    Args:
      q, lse: of the call. For keys in ``weighted(term, w)``, pass ``lse - w``.
      k: the keys of the call, or the entries as they were passed.
      listed: positions of keys, as ``select`` returns them for cells of one key; an
        entry outside of ``0 .. kv_seq - 1`` has weight 0. The number of groups divides
        that of the query heads, and is a multiple of that of key heads, or divides it.
      sm_scale, logits_soft_cap: of the call.
      detach: no gradient flows to q, k and lse.

    Returns:
      float32, or float64.

    Raises:
      ValueError: the shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x = jnp.zeros((1, 4, 2, 8))
      >>> _, lse = sa.attention(x, x, x, sa.causal(), return_lse=True)
      >>> listed = jnp.array([[0, 4], [0, 1], [0, 1], [0, 1]])[None, None]
      >>> key_mass(x, x, lse, listed)[0, 0, :2].round(3).tolist()
      [[2.0, 0.0], [1.0, 1.0]]
    """
    if k.ndim == 3 or k.shape[:-3] == (1,):
        k = jnp.broadcast_to(k, (len(q), *k.shape[-3:]))
    if k.shape[1:2] != (0,):
        checks.problem(q, k, k, 0)
    _check(q, k, lse, listed)
    if not k.shape[1] or not listed.shape[3]:
        return jnp.zeros((len(q), *listed.shape[1:]), wide(q.dtype))
    if detach:
        q, k, lse = jax.lax.stop_gradient((q, k, lse))
    scale = checks.scale(sm_scale, q.shape[-1])
    scale = scale if isinstance(scale, float) else scale.astype(wide(q.dtype))
    return _masses(q, k, lse, listed, scale, logits_soft_cap)


def _masses(
    q: Array, k: Array, lse: Array, listed: Array, scale: Any, cap: float | None
) -> Float[Array, "batch groups q keys"]:
    """One strip of queries after another."""
    batch, length, heads, _ = q.shape
    groups, count = listed.shape[1], listed.shape[3]
    strip = max(1, min(length, MOST_KEYS // count))
    strips = -(-length // strip)

    def cut(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, strips * strip - length)
        x = jnp.pad(x, widths)
        shape = (*x.shape[:axis], strips, strip, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    listed = jnp.broadcast_to(listed, (batch, *listed.shape[1:]))
    q, k, lse = widened(q), jnp.swapaxes(widened(k), 1, 2), widened(lse)

    @jax.checkpoint
    def of(x: tuple) -> Float[Array, "batch groups strip keys"]:
        q, lse, at = x
        real = (at >= 0) & (at < k.shape[2])
        at = jnp.clip(at, 0, k.shape[2] - 1)
        s = _scores(q, k, at) * scale
        if cap is not None:
            s = cap * jnp.tanh(s / cap)
        lse = lse.reshape(batch, groups, heads // groups, strip)
        some = ~jnp.isneginf(lse)
        p = jnp.exp(s - jnp.where(some, lse, 0.0)[..., None])
        held = real[:, :, None] & some[..., None]
        return jnp.sum(jnp.where(held, p, 0.0), axis=2)

    found = jax.lax.map(of, (cut(q, 1), cut(lse, 2), cut(listed, 2)))
    found = jnp.moveaxis(found, 0, 2)
    return found.reshape(batch, groups, -1, count)[:, :, :length]


def _scores(q: Array, k: Array, at: Array) -> Float[Array, "batch groups heads q keys"]:
    """Products of queries ``[batch, q, heads, dim]`` with listed keys.

    ``k`` is ``[batch, kv_heads, kv, dim]`` and ``at`` ``[batch, groups, q, keys]``.
    """
    batch, _, heads, _ = q.shape
    kv_heads, groups = k.shape[1], at.shape[1]
    units = max(kv_heads, groups)
    of_unit = jnp.arange(units)
    key = k[:, of_unit * kv_heads // units]
    place = at[:, of_unit * groups // units]
    rows = jnp.take_along_axis(
        key[:, :, None], place[..., None], axis=3, mode="promise_in_bounds"
    )
    length, dim = q.shape[1], q.shape[3]
    q = jnp.moveaxis(q, 1, 2).reshape(batch, units, heads // units, length, dim)
    s = jnp.einsum("buhqd,buqkd->buhqk", q, rows, precision="highest")
    return s.reshape(batch, groups, heads // groups, *s.shape[3:])


def _check(q: Array, k: Array, lse: Array, listed: Array) -> None:
    batch, length, heads, _ = q.shape
    if lse.shape != (batch, heads, length):
        raise ValueError(
            f"key_mass: lse has shape {lse.shape}: it must be {(batch, heads, length)}"
        )
    fits = listed.ndim == 4 and listed.shape[0] in (1, batch)
    if not fits or listed.shape[2] != length:
        raise ValueError(
            f"key_mass: listed has shape {listed.shape}: it must be [batch or 1, "
            f"groups, {length}, keys]"
        )
    groups, kv_heads = listed.shape[1], k.shape[2]
    if heads % groups or (kv_heads % groups and groups % kv_heads):
        raise ValueError(
            f"key_mass: {groups} groups of lists do not fit {heads} query heads and "
            f"{kv_heads} key heads: one must divide the other"
        )
