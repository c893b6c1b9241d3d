"""The scores of ``dot`` at listed keys, with gradients: what trains an indexer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sadsl.selections.dot_scores import Dot

# A strip of queries gathers at most so many keys.
MOST_KEYS = 1 << 14


def listed_scores(
    score: Dot,
    operands: Mapping[str, Any],
    listed: Int[Array, "batch_or_1 groups q_seq keys"],
) -> Float[Array, "batch groups q_seq keys"]:
    """The scores of listed keys, float32; those of entries without a key are not 0.

    Memory is linear in the size of the lists. The first derivative in reverse mode is
    defined.

    Args:
      score: made by ``dot``.
      operands: its arrays, each with a batch axis.
      listed: positions of rows of its ``k``; others are clipped.

    Raises:
      ValueError: the heads of q are not a multiple of the number of groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.selections import dot
      >>> iq, ik = jnp.ones((1, 2, 1, 3)), jnp.arange(2.0).reshape(1, 2, 1, 1)
      >>> arrays = {"iq": iq, "ik": jnp.broadcast_to(ik, (1, 2, 1, 3))}
      >>> listed_scores(dot(), arrays, jnp.array([[[[0, 1], [1, 0]]]])).tolist()
      [[[[0.0, 3.0], [3.0, 0.0]]]]
    """
    q, k = (jnp.asarray(operands[name]) for name in (score.q, score.k))
    groups, heads = listed.shape[1], q.shape[2]
    if heads % groups:
        raise ValueError(
            f"listed has {groups} groups: the {heads} heads of {score.q!r} must be a "
            "multiple of them"
        )
    weights = jnp.ones(q.shape[:3], jnp.float32)
    if score.weights is not None:
        weights = jnp.asarray(operands[score.weights])
    batch = max(len(q), len(k), len(listed))
    arrays = (x.astype(jnp.float32) for x in (q, weights, k))
    arrays = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in arrays)
    listed = jnp.broadcast_to(listed, (batch, *listed.shape[1:]))
    plain = (score.act, score.scale)
    return _scores(plain, *arrays, jnp.clip(listed, 0, k.shape[1] - 1))


def _strip(
    plain: tuple, q: Array, weights: Array, rows: Array
) -> Float[Array, "groups strip keys"]:
    """The scores of a strip: q ``[strip, groups, each, dim]``, rows as gathered.

    Rows are ``[groups, strip, keys, 1 or each, dim]``.
    """
    act, scale = plain
    total = jnp.zeros(rows.shape[:3], jnp.float32)
    for head in range(q.shape[2]):
        key = rows[:, :, :, min(head, rows.shape[3] - 1)]
        own = jnp.einsum("sgd,gskd->gsk", q[:, :, head], key, precision="highest")
        own = own * scale
        own = jax.nn.relu(own) if act == "relu" else own
        total = total + own * weights[:, :, head].T[..., None]
    return total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    plain: tuple, q: Array, weights: Array, k: Array, at: Array
) -> Float[Array, "batch groups q keys"]:
    def of_entry(entry: tuple) -> Array:
        q, weights, k, at = entry
        strips, whole = _cut(q, weights, at)

        def of(x: tuple) -> Array:
            q, weights, at = x
            return _strip(plain, q, weights, _rows(k, at))

        return _joined(jax.lax.map(of, strips), whole)

    return jax.lax.map(of_entry, (q, weights, k, at))


def _forward(plain: tuple, *arrays: Array) -> tuple[Array, tuple]:
    return _scores(plain, *arrays), arrays


def _backward(plain: tuple, arrays: tuple, cotangent: Array) -> tuple:
    def of_entry(entry: tuple) -> tuple:
        q, weights, k, at, cotangent = entry
        strips, whole = _cut(q, weights, at)
        heads, (given, _) = q.shape[1], _cut_last(cotangent, whole)

        def of(dk: Array, x: tuple) -> tuple[Array, tuple]:
            q, weights, at, cotangent = x
            rows = _rows(k, at)
            run = partial(_strip, plain)
            _, pull = jax.vjp(run, q, weights, rows)
            dq, dweights, drows = pull(cotangent)
            # One after another: the order of additions is fixed on a CPU.
            flat = _merged_rows(drows, k.shape[1])
            return dk.at[_places(at)].add(flat), (dq, dweights)

        dk, (dq, dweights) = jax.lax.scan(of, jnp.zeros_like(k), (*strips, given))
        dq = dq.reshape(-1, heads, q.shape[2])[: len(q)]
        return dq, dweights.reshape(-1, heads)[: len(q)], dk

    q, weights, k, at = arrays
    found = jax.lax.map(of_entry, (q, weights, k, at, cotangent))
    return (*found, None)


_scores.defvjp(_forward, _backward)


def _cut(q: Array, weights: Array, at: Array) -> tuple[tuple, int]:
    """The arrays of one batch entry in strips of queries, and their number."""
    groups, length, count = at.shape
    strip = max(1, min(length, MOST_KEYS // count))
    strips = -(-length // strip)
    after = strips * strip - length
    each = q.shape[1] // groups
    q = jnp.pad(q, ((0, after), (0, 0), (0, 0)))
    weights = jnp.pad(weights, ((0, after), (0, 0)))
    at = jnp.pad(at, ((0, 0), (0, after), (0, 0)))
    return (
        q.reshape(strips, strip, groups, each, -1),
        weights.reshape(strips, strip, groups, each),
        jnp.moveaxis(at.reshape(groups, strips, strip, count), 1, 0),
    ), length


def _cut_last(x: Array, length: int) -> tuple[Array, int]:
    """A cotangent ``[groups, q, keys]`` in the same strips."""
    groups, _, count = x.shape
    strip = max(1, min(length, MOST_KEYS // count))
    strips = -(-length // strip)
    x = jnp.pad(x, ((0, 0), (0, strips * strip - length), (0, 0)))
    return jnp.moveaxis(x.reshape(groups, strips, strip, count), 1, 0), length


def _joined(x: Array, length: int) -> Float[Array, "groups q keys"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, :length]


def _rows(k: Array, at: Array) -> Float[Array, "groups strip keys heads dim"]:
    """The listed rows of ``k [kv, heads, dim]``; each group its share of the heads."""
    groups, heads = at.shape[0], k.shape[1]
    if heads == 1:
        return k[at]
    own = k.reshape(len(k), groups, heads // groups, -1)
    return jnp.stack([own[at[g], g] for g in range(groups)])


def _places(at: Array) -> Int[Array, " entries"]:
    return at.reshape(-1)


def _merged_rows(rows: Array, heads: int) -> Float[Array, "entries heads dim"]:
    """Gradients of rows as additions to ``[kv, heads, dim]``."""
    groups, each = rows.shape[0], rows.shape[3]
    flat = rows.reshape(groups, -1, each, rows.shape[-1])
    if heads == 1:
        return flat.reshape(-1, 1, rows.shape[-1])
    wide = jnp.zeros((groups, flat.shape[1], groups, each, rows.shape[-1]), rows.dtype)
    of_group = jnp.arange(groups)
    wide = wide.at[of_group, :, of_group].set(flat)
    return wide.reshape(-1, heads, rows.shape[-1])
