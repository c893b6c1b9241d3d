"""Multiplies the queries by the ``scale`` of a softmax."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering.bias.nodes import resolved
from lowering.bias.verify import verify_scores
from lowering.problem import Problem
from lowering.run_time import bias_values
from pallas_kernels.precision import wide, widened
from sadsl.maps.integers import integers
from sadsl.run.operands import with_batch_axis
from sadsl.terms.biases import Bias


def scaled(
    q: Float[Array, "batch q heads dim"],
    scale: Bias,
    problem: Problem,
    given: Mapping[str, Any],
) -> Float[Array, "batch q heads dim"]:
    """``q`` times the factor of each query and head, in the dtype of ``q``.

    Raises:
      ValueError: an array of the scale is missing, or has the wrong shape.
    """
    ranks = {**scale.operands, **scale.integer_operands}
    arrays = {
        name: jnp.asarray(x) if name in scale.operands else integers(name, x)
        for name, x in given.items()
        if name in ranks
    }
    arrays = with_batch_axis(arrays, ranks, q.shape[0])
    score = scale.score(problem.num_heads)
    shapes = {name: x.shape[1:] for name, x in arrays.items()}
    verify_scores(score, problem, shapes)
    position = jnp.arange(problem.q_seq_len, dtype=jnp.int32)[None, None]
    zero = jnp.zeros((1, 1, 1), jnp.int32)
    places = bias_values.BiasPlaces(
        position, zero, problem, arrays, dtype=wide(q.dtype)
    )
    factor = bias_values.dense(resolved(score, problem), places)
    factor = jnp.swapaxes(factor, 1, 2)[..., None]
    return (widened(q) * factor).astype(q.dtype)
