"""Merges the outputs of several parts by their log-sum-exps, or averages them.

Let ``o_p`` be the output of part ``p`` and ``L_p`` its log-sum-exp. If no pair is in
two parts, one softmax over all pairs is ``sum_p exp(L_p - L) o_p`` with
``L = log sum_p exp(L_p)``.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering.run_time import adjoint
from pallas_kernels.precision import widened
from sadsl.run.types import Outcome


def merge(parts: Sequence[Outcome]) -> Outcome:
    """One softmax over disjoint parts, each of which has an lse."""
    lses = tuple(part.lse for part in parts if part.lse is not None)
    assert len(lses) == len(parts)
    return Outcome(*_merge(tuple(part.out for part in parts), lses))


def beside(parts: Sequence[Outcome]) -> Outcome:
    """The outcomes of neighbouring heads, joined; an lse if all have one."""
    out = jnp.concatenate([part.out for part in parts], axis=2)
    lses = [part.lse for part in parts if part.lse is not None]
    return Outcome(out, jnp.concatenate(lses, 1) if len(lses) == len(parts) else None)


@jax.jit
def _merge(outs: tuple[Array, ...], lses: tuple[Array, ...]) -> tuple[Array, Array]:
    """Merges ``[batch, q_seq, heads, dim]`` by lses ``[batch, heads, q_seq]``."""
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
    """The linear map that repeats an array along a new last axis, and its transpose.

    The transpose is a sum over that axis, written as a matmul: XLA:CPU reduces the last
    axis serially, and a matmul is faster.
    """

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(x[..., None], (*x.shape, size))

    def added(y: Array) -> Array:
        return jnp.matmul(y, jnp.ones(size, y.dtype), precision="highest")

    return spread, added


def _shares(lses: tuple[Array, ...]) -> tuple[list[Array], Array]:
    """The share of each part in the common normaliser, and the common lse.

    ``share_p = exp(L_p - L)`` with ``L = log sum_p exp(L_p)``, computed relative to the
    greatest ``L_p``.
    """
    stacked = jnp.stack(lses)
    top = jax.lax.stop_gradient(stacked.max(axis=0))
    # Where all parts are empty, -inf minus -inf would be NaN.
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
    sinks: Float[Array, "batch_or_1 q_seq_or_1 heads"],
) -> Outcome:
    """Adds a logit without a value to the normaliser of each query."""
    logits = jnp.swapaxes(sinks.astype(lse.dtype), 1, 2)
    logits = jnp.broadcast_to(logits, lse.shape)
    (share, _), total = _shares((lse, logits))
    scaled = _times(jnp.swapaxes(share, 1, 2), out.astype(share.dtype))
    return Outcome(scaled.astype(out.dtype), total)


@jax.jit
def mean(outs: tuple[Array, ...]) -> Array:
    """The mean of outputs, accumulated in float32 at least."""
    total = _sum([widened(out) for out in outs])
    return (total / len(outs)).astype(outs[0].dtype)


@jax.jit
def gated_sum(outs: tuple[Array, ...], gates: Float[Array, "... parts"]) -> Array:
    """``sum_m gates[..., m] * outs[m]``, accumulated in float32 at least.

    ``gates`` is ``[batch or 1, q_seq, heads, parts]``.
    """
    wide = [widened(out) for out in outs]
    weight = gates.astype(wide[0].dtype)
    shape = wide[0].shape[:-1]
    each = [jnp.broadcast_to(weight[..., m], shape) for m in range(len(wide))]
    total = _sum([_times(w, out) for w, out in zip(each, wide, strict=True)])
    return total.astype(outs[0].dtype)


def _sum(arrays: Sequence[Array]) -> Array:
    """The sum, without the zero that Python's ``sum`` starts from."""
    return reduce(add, arrays)
