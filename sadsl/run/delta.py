"""The arrays of a recurrence of ``delta``: normalised keys, betas, erase vectors.

A token that writes several keys becomes several positions of the recurrence. It decays
the state at the first of them, and reads it at the last.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import linear as kernels
from pallas_kernels.precision import widened
from sadsl.run.linear import TokenArrays, document_ids, prepared, tokens
from sadsl.run.linear_operands import (
    log_decays,
    product_dtype,
    token_operand,
)
from sadsl.run.recurrence import Arrays
from sadsl.run.types import QKV, Setting
from sadsl.terms.delta import KEY, Delta

# Added to the squared norm of q and k.
NORM_EPS = 1e-6


@tokens.register
def _(
    term: Delta, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> TokenArrays:
    q, k, v = inputs
    steps = term.steps
    if steps > 1 and k.shape[1] != steps * q.shape[1]:
        raise ValueError(
            f"{term!r}: q has {q.shape[1]} tokens and k has {k.shape[1]}: with "
            f"steps={steps} k and v must have {steps} keys for each token of q"
        )
    ids = document_ids(term, inputs, given)
    if term.write is not None:
        # First the vector b writes what a reads; then the key writes its value.
        steps = 2
        shapes = q, k, v
        write = token_operand(
            term, given, term.write, "vectors", shapes, by_channel=True
        )
        heads = max(write.shape[2], k.shape[2])
        write, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (write, k))
        k = _in_turn(write.astype(k.dtype), k)
        v = _in_turn(jnp.zeros_like(v), v)
        if ids is not None:
            ids = ids[0], jnp.repeat(ids[1], 2, axis=1)
    if steps == 1:
        return TokenArrays(q, k, v, ids, setting.q_offset)
    if ids is not None:
        ids = jnp.repeat(ids[0], steps, axis=1), ids[1]
    q = _spread(q, steps, steps - 1)
    return TokenArrays(q, k, v, ids, steps * setting.q_offset, steps)


@prepared.register
def _(
    term: Delta, found: TokenArrays, given: Mapping[str, Any], setting: Setting
) -> tuple[Arrays, kernels.Recurrence]:
    q, k, v, steps = found.q, found.k, found.v, found.steps
    # The sizes that operands of keys and of tokens have.
    written = 1 if term.write is None else 2
    of_keys = _parts_of(q, steps), _parts_of(k, written), _parts_of(v, written)
    of_tokens = _parts_of(q, steps), _parts_of(k, steps), _parts_of(v, steps)
    # In the width of sums; rounded once, to the dtype of products.
    q, k, wide_v = widened(q), widened(k), widened(v)
    if term.normalise_keys:
        q = _unit(q)
        k = _unit(k) if term.write is None else _in_turn(k[:, ::2], _unit(k[:, 1::2]))
    erase = k if term.erase == KEY else _erase_vectors(term, given, of_keys)
    beta = _betas(term, given, of_keys)
    erase, wide_v = _weighed(beta, erase), _weighed(beta, wide_v)
    decay = log_decays(term, given, of_tokens, found.q_offset // steps)
    if decay is not None and steps > 1:
        decay = jnp.swapaxes(_spread(jnp.swapaxes(decay, 1, 2), steps, 0), 1, 2)
    if term.write is not None and decay is not None and decay.ndim == 3:
        # Only factors by channel have a form without the own step.
        decay = jnp.broadcast_to(decay[..., None], (*decay.shape, k.shape[-1]))
    dtype = product_dtype(found.q.dtype)
    q = (q * setting.sm_scale).astype(dtype)
    k, v, erase = (x.astype(dtype) for x in (k, wide_v, erase))
    rule = kernels.Recurrence(erase_before=term.write is not None)
    return Arrays(q, k, v, erase, decay), rule


def _parts_of(x: Array, count: int) -> jax.ShapeDtypeStruct:
    """The shape of ``x [batch, seq, heads, dim]`` with ``seq / count`` positions."""
    shape = x.shape[0], x.shape[1] // count, *x.shape[2:]
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _erase_vectors(term: Delta, given: Mapping[str, Any], shapes: tuple) -> Array:
    """The operand of erase vectors; with ``write``, the second key erases nothing."""
    found = token_operand(term, given, term.erase, "vectors", shapes, by_channel=True)
    found = widened(found)
    if term.write is None:
        return found
    return _in_turn(-found, jnp.zeros_like(found))


def _betas(term: Delta, given: Mapping[str, Any], shapes: tuple) -> Array | float:
    """The operand of betas, ``[batch, kv_seq, heads, 1]``, or one number.

    Raises:
      ValueError: it was not given, does not fit, or is known and not in [0, 2].
    """
    if not isinstance(term.beta, str):
        return 1.0 if term.beta is None else term.beta
    beta = token_operand(term, given, term.beta, "betas", shapes, by_channel=False)
    known = given[term.beta]
    if not isinstance(known, jax.core.Tracer):
        known = np.asarray(known, np.float32)
        if (known < 0).any() or (known > 2).any():
            worst = known.flat[np.abs(known - 1).argmax()]
            raise ValueError(
                f"operand {term.beta!r} holds {worst:.3g}: betas must be in [0, 2], "
                "such as those of jax.nn.sigmoid: beyond that a state grows"
            )
    return widened(beta)[..., None]


def _weighed(beta: Any, x: Array) -> Array:
    """``beta * x`` by heads of whichever has more of them."""
    if isinstance(beta, float):
        return x if beta == 1 else beta * x
    heads = max(beta.shape[2], x.shape[2])
    beta, x = (jnp.repeat(y, heads // y.shape[2], axis=2) for y in (beta, x))
    return beta * x


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPS)


def _in_turn(a: Array, b: Array) -> Array:
    """``[batch, seq, ...]`` twice as ``[batch, 2 seq, ...]``: a, b, a, b, ..."""
    both = jnp.stack([a, b], axis=2)
    return both.reshape(a.shape[0], -1, *a.shape[2:])


def _spread(x: Array, steps: int, at: int) -> Array:
    """``[batch, seq, ...]`` at every ``steps``-th position from ``at``, 0 elsewhere."""
    spread = jnp.zeros((*x.shape[:2], steps, *x.shape[2:]), x.dtype)
    spread = spread.at[:, :, at].set(x)
    return spread.reshape(x.shape[0], -1, *x.shape[2:])
