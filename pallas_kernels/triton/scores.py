"""Computes the score values and the dropout factor of a tile in a Triton kernel."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dropout
from pallas_kernels.call import Call, PairValues, ScoreValues, Vectors
from pallas_kernels.triton.runs import TritonSizes, along


class Here(NamedTuple):
    """The place of a tile: its positions, and the head of its arrays.

    ``q_ids`` are ``[q, 1]`` and ``k_ids`` are ``[1, k]``, or ``[1, q]`` and ``[k, 1]``.
    The ranges are ``pl.ds`` slices of positions. ``member`` is the index of the query
    head in its group; None if the refs have no axis of heads.
    """

    q_ids: jax.Array
    k_ids: jax.Array
    q_range: Any
    kv_range: Any
    member: Any = None


def added_scores(
    values: ScoreValues, here: Here, sizes: TritonSizes, call: Call
) -> jax.Array | None:
    """The values added to the capped scores of a tile; None if nothing is added."""
    if call.scores is None:
        return None
    q_ids, k_ids, q_range, kv_range, member = here
    q_axis = 0 if q_ids.shape[1] == 1 else 1

    def lead(ref: Any) -> tuple:
        return _lead(ref, member)

    def of_pairs(x: PairValues) -> jax.Array:
        ref = x.values
        if x.diagonal:
            return ref[*lead(ref), q_ids - k_ids + (sizes.padded_kv - 1)]
        shape = jnp.broadcast_shapes(q_ids.shape, k_ids.shape)
        at = jnp.broadcast_to(q_ids, shape), jnp.broadcast_to(k_ids, shape)
        return ref[*lead(ref), *at]

    return call.scores(
        q_ids,
        k_ids,
        tuple(along(ref[*lead(ref), q_range], q_axis) for ref in values.q),
        tuple(along(ref[*lead(ref), kv_range], 1 - q_axis) for ref in values.kv),
        tuple(map(of_pairs, values.pairs)),
    )


def not_removed(
    values: ScoreValues, added: jax.Array | None, pairs: jax.Array | None
) -> jax.Array | None:
    """``pairs`` without those to which ``-inf`` is added; None means all pairs.

    None stays None: the sum of a finite score and ``-inf`` has weight 0 anyway.
    """
    if pairs is None or added is None or not any(values):
        return pairs
    return pairs & (added > -jnp.inf)


def dropout_factor(vectors: Vectors, here: Here, call: Call) -> jax.Array | None:
    """The dropout factor of the weights of a tile; None without dropout."""
    if not call.dropout_rate:
        return None
    assert vectors.seeds is not None
    q_axis = 0 if here.q_ids.shape[1] == 1 else 1

    def seeds(ref: Any, at: Any, axis: int) -> jax.Array:
        return along(ref[*_lead(ref, here.member), at], axis)

    return dropout.factor(
        seeds(vectors.seeds.q, here.q_range, q_axis),
        seeds(vectors.seeds.kv, here.kv_range, 1 - q_axis),
        call.dropout_rate,
    )


def _lead(ref: Any, member: Any) -> tuple:
    return () if member is None else (0 if ref.shape[0] == 1 else member,)


def padded(values: ScoreValues, sizes: TritonSizes) -> ScoreValues:
    """The score values padded to whole blocks.

    The value of the padding does not matter: its pairs are masked or dropped.
    """
    more_q = sizes.padded_q - sizes.q_seq_len
    more_kv = sizes.padded_kv - sizes.kv_seq_len

    def pad(x: jax.Array, *widths: tuple[int, int]) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), *widths))

    def of_pairs(x: PairValues) -> PairValues:
        if x.diagonal:
            return replace(x, values=pad(x.values, (more_kv, more_q)))
        return replace(x, values=pad(x.values, (0, more_q), (0, more_kv)))

    return ScoreValues(
        tuple(pad(x, (0, more_q)) for x in values.q),
        tuple(pad(x, (0, more_kv)) for x in values.kv),
        tuple(map(of_pairs, values.pairs)),
    )
