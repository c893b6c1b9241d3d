"""Finds the best entries of the last axis: a number of them, or a sum of weights.

It does not sort: a bisection over the bits of the scores takes 32 counts, whatever the
budget, and each set (the entries along the last axis) may have its own budget.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from pallas_kernels.loops import repeat
from pallas_kernels.varying import vary


def top(
    scores: Float[Array, "*sets entries"],
    competing: Bool[Array, "*sets entries"],
    count: Int[Array, "*#sets"],
) -> Bool[Array, "*sets entries"]:
    """The ``count`` greatest competing scores of each set; ties go to the lower index.

    Where fewer compete, all of them are taken. Competing scores must be finite.
    """
    order = _ordered(scores, competing)
    limit = _greatest(32, lambda x: _count(order >= x[..., None]) >= count, order)
    limit = limit[..., None]
    above, tied = order > limit, competing & (order == limit)
    left = count - _count(above)
    return above | tied & (_places(order) < _last_place(tied, lambda x: x <= left))


def heaviest(
    weights: Float[Array, "*sets entries"],
    competing: Bool[Array, "*sets entries"],
    target: Float[Array, "*#sets"],
) -> Bool[Array, "*sets entries"]:
    """The fewest competing weights of each set that add up to ``target``.

    The greatest are taken first; ties go to the lower index. All are taken where they
    do not reach the target, none where it is not positive. Weights must be at least 0.
    """
    order = _ordered(weights, competing)
    weights = jnp.where(competing, weights, 0.0)

    def total(held: Bool[Array, "*sets entries"]) -> Float[Array, "*sets"]:
        return jnp.sum(jnp.where(held, weights, 0.0), axis=-1)

    limit = _greatest(32, lambda x: total(order >= x[..., None]) >= target, order)
    limit = limit[..., None]
    above, tied = order > limit, competing & (order == limit)
    held, each = total(above), jnp.max(jnp.where(tied, weights, 0.0), axis=-1)

    def still_short(count: Int[Array, "*sets"]) -> Bool[Array, "*sets"]:
        before = jnp.maximum(count - 1, 0).astype(jnp.float32)
        return (count == 0) | (held + before * each < target)

    return above | tied & (_places(order) < _last_place(tied, still_short))


def _count(held: Bool[Array, "*sets entries"]) -> Int[Array, "*sets"]:
    return jnp.sum(held, axis=-1, dtype=jnp.int32)


def _ordered(
    x: Float[Array, "*sets entries"], competing: Bool[Array, "*sets entries"]
) -> UInt32[Array, "*sets entries"]:
    """Unsigned integers in the order of the floats; 0, below all, if not competing."""
    # -0.0 must equal 0.0. XLA would remove an addition of 0.
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    order = jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31)))
    found = jax.lax.bitcast_convert_type(order, jnp.uint32)
    return jnp.where(competing, found, jnp.uint32(0))


def _places(x: Array) -> UInt32[Array, "*ones entries"]:
    """The index of each entry in its set."""
    return jax.lax.broadcasted_iota(
        jnp.uint32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1
    )


def _last_place(
    tied: Bool[Array, "*sets entries"],
    holds: Callable[[Int[Array, "*sets"]], Bool[Array, "*sets"]],
) -> UInt32[Array, "*sets 1"]:
    """The greatest index such that the count of tied entries below it ``holds``.

    Several counts are faster than one cumulative sum.
    """
    place, bits = _places(tied), tied.shape[-1].bit_length()
    found = _greatest(
        bits, lambda x: holds(_count(tied & (place < x[..., None]))), tied
    )
    return found[..., None]


def _greatest(
    bits: int,
    holds: Callable[[UInt32[Array, "*sets"]], Bool[Array, "*sets"]],
    like: Shaped[Array, "*sets entries"],
) -> UInt32[Array, "*sets"]:
    """The greatest integer of ``bits`` bits for which ``holds`` is true, else 0.

    If it is true for an integer, it must be true for all smaller ones.
    """

    def step(i: Int[Array, ""], found: UInt32[Array, "*sets"]) -> Array:
        raised = found | (
            jnp.uint32(1) << (jnp.uint32(bits - 1) - i.astype(jnp.uint32))
        )
        return jnp.where(holds(raised), raised, found)

    start = vary(jnp.zeros(like.shape[:-1], jnp.uint32), like)
    return repeat(bits, step, start)
