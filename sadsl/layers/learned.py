"""What a spec learns: the arrays that both layers make and hand over as operands.

A spec names the arrays (``Term.learned``): sinks, tables of a bias, decays; or gates,
one a query, which are projected from the layer's input. Functions with parameters, such
as feature maps, are the layer's ``modules``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.terms.base import LayerSizes, Learned, Term

# The deviation of arrays that start "normal".
STDDEV = 0.02
# Log-decays are this much smaller than a log-sigmoid, so that a state keeps 0.96 of
# itself in a first step, not a half (Yang et al., Gated linear attention, 2024).
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
    """The features of the projection that makes a ``per_query`` array."""
    return math.prod(array.shape)


def operands_of(
    wanted: Mapping[str, Learned],
    made: Mapping[str, Any],
    x: Float[Array, "batch q_seq features"],
) -> dict[str, Array]:
    """The arrays by name; ``made`` has a parameter or a projection for each.

    Those of a query are ``[batch, q_seq, *shape]``, squashed in float32 (float64 for
    float64).
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
    """The dropout rate of a layer.

    Raises:
      ValueError: it is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate} must be at least 0 and below 1")
    return float(rate)
