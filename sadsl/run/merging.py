"""Outputs with their log-sum-exps, merged: the arithmetic of mixtures.

With ``o_p`` and ``L_p`` the output and the log-sum-exp of part ``p``, one softmax over
all pairs is ``sum_p exp(L_p - L) o_p`` with ``L = log sum_p exp(L_p)``, as long as no
pair is in two parts.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering.run_time import adjoint
from pallas_kernels.precision import widened
from sadsl.run.types import Outcome


def merge(parts: Sequence[Outcome]) -> Outcome:
    """One normaliser over disjoint parts, each of which has an lse."""
    lses = tuple(part.lse for part in parts if part.lse is not None)
    assert len(lses) == len(parts)
    return Outcome(*_merge(tuple(part.out for part in parts), lses))


@jax.jit
def _merge(outs: tuple[Array, ...], lses: tuple[Array, ...]) -> tuple[Array, Array]:
    shares, lse = _shares(lses)
    out = _sum(
        [
            _times(jnp.swapaxes(share, 1, 2), out.astype(share.dtype))
            for share, out in zip(shares, outs, strict=True)
        ]
    )
    return out.astype(outs[0].dtype), lse


def _times(weight: Array, out: Array) -> Array:
    """``weight[..., None] * out``."""
    spread, added = _along(out.shape[-1])
    return adjoint.linear(spread, added, weight) * out


@lru_cache
def _along(size: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """One more axis of ``size`` with the same everywhere, and its transpose, a sum.

    CPUs add up the last axis of an array one number at a time, but for dots.
    """

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(x[..., None], (*x.shape, size))

    def added(y: Array) -> Array:
        return jnp.matmul(y, jnp.ones(size, y.dtype), precision="highest")

    return spread, added


def _shares(lses: tuple[Array, ...]) -> tuple[list[Array], Array]:
    """The part of the common normaliser that each has, and its logarithm."""
    stacked = jnp.stack(lses)
    top = jax.lax.stop_gradient(stacked.max(axis=0))
    # Where all parts are empty, nothing is subtracted from -inf.
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    empty = jnp.isneginf(stacked)
    share = jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, stacked - top[None])))
    total = share.sum(axis=0)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return list(share / safe[None]), lse


@jax.jit
def with_sink(
    out: Float[Array, "batch q_seq heads head_dim_v"],
    lse: Float[Array, "batch heads q_seq"],
    sinks: Float[Array, "batch_or_1 heads"],
) -> Outcome:
    """One more logit under the normaliser, to which no value belongs."""
    logits = jnp.broadcast_to(sinks.astype(lse.dtype)[:, :, None], lse.shape)
    (share, _), total = _shares((lse, logits))
    fewer = _times(jnp.swapaxes(share, 1, 2), out.astype(share.dtype))
    return Outcome(fewer.astype(out.dtype), total)


@jax.jit
def mean(outs: tuple[Array, ...]) -> Array:
    """The mean of outputs, accumulated in float32 at least."""
    total = _sum([widened(out) for out in outs])
    return (total / len(outs)).astype(outs[0].dtype)


@jax.jit
def gated_sum(outs: tuple[Array, ...], gates: Float[Array, "... parts"]) -> Array:
    """The sum of outputs, each times its gate ``[batch or 1, q_seq, heads]``."""
    wide = [widened(out) for out in outs]
    weight = gates.astype(wide[0].dtype)
    shape = wide[0].shape[:-1]
    each = [jnp.broadcast_to(weight[..., m], shape) for m in range(len(wide))]
    total = _sum([_times(w, out) for w, out in zip(each, wide, strict=True)])
    return total.astype(outs[0].dtype)


def _sum(arrays: Sequence[Array]) -> Array:
    return partial(sum, start=arrays[0])(arrays[1:])
