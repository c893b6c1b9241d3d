"""Arrays that a spec learns: both layers make them and pass them as operands.

A spec names its arrays (``Term.learned``). Some are parameters: sinks, tables of a
bias, decays. Others are gates, one for each query, projected from the layer's input.
Functions with parameters, such as feature maps, are the layer's ``modules``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.terms.base import LayerSizes, Learned, Term

# Standard deviation of arrays that start "normal".
STDDEV = 0.02
# A log-decay is a log-sigmoid divided by this, so that a state first keeps 0.96 of
# itself in a step, not a half (Yang et al., Gated linear attention, 2024).
DECAY_TEMPERATURE = 16


def learned_of(
    term: Term, sizes: LayerSizes, modules: Mapping[str, Any] | None
) -> dict[str, Learned]:
    """The arrays that a layer makes for ``term``, by name, but those of ``modules``.

    Raises:
      ValueError: the spec reads nothing of the name of a module.
    """
    modules = modules or {}
    for name in modules:
        if not term.reads(name):
            raise ValueError(
                f"modules has {name!r}, but {term!r} reads nothing of that name: name "
                "it in the spec, or leave the module out"
            )
    found = term.learned(sizes)
    return {name: array for name, array in found.items() if name not in modules}


def started(array: Learned) -> Callable[..., Array]:
    """The initializer of an array, or of the bias of its projection."""
    match array.start:
        case "zeros":
            return jax.nn.initializers.zeros
        case "ones":
            return jax.nn.initializers.ones
        case "normal":
            return jax.nn.initializers.normal(STDDEV)
    assert_never(array.start)


def width(array: Learned) -> int:
    """Number of features of the projection that makes a ``per_query`` array."""
    return math.prod(array.shape)


def operands_of(
    wanted: Mapping[str, Learned],
    made: Mapping[str, Any],
    x: Float[Array, "batch q_seq features"],
) -> dict[str, Array]:
    """The arrays by name; ``made`` has a parameter or a projection for each.

    A ``per_query`` array is ``[batch, q_seq, *shape]``. It is squashed in float32
    (float64 for float64).
    """
    found = {}
    for name, array in wanted.items():
        if not array.per_query:
            found[name] = made[name]
            continue
        y = made[name](x).reshape(*x.shape[:-1], *array.shape)
        found[name] = _squashed(y, array)
    return found


def _squashed(y: Array, array: Learned) -> Array:
    y = widened(y)
    match array.squash:
        case None:
            return y
        case "sigmoid":
            return jax.nn.sigmoid(y)
        case "log_sigmoid":
            return jax.nn.log_sigmoid(y) / DECAY_TEMPERATURE
    assert_never(array.squash)


def rate_checked(rate: float) -> float:
    """Checks the dropout rate of a layer and returns it.

    Raises:
      ValueError: it is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate} must be at least 0 and below 1")
    return float(rate)
