"""Inkling 1 and 2: a bias by distance that each query weighs itself."""

import math

from sadsl.catalog.models.delta_hybrids import in_turn
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.named import causal, window
from sadsl.maps.numbers import log
from sadsl.maps.symbols import maximum
from sadsl.terms.base import Term
from sadsl.terms.biases import Bias, bias
from sadsl.terms.query_biases import query_distance_bias
from sadsl.terms.softmax import softmax


def inkling(
    num_layers: int = 66,
    near: int = 512,
    extent: int = 1024,
    channels: int = 16,
    floor: int | None = None,
    alpha: float = 0.1,
) -> tuple[Term, ...]:
    """Inkling: five windows, one full layer, and so on, without rotary positions.

    As in transformers 5.24, with the defaults of its class: 64 query heads, 8 key heads
    in full layers and 16 in windows; q and k are normed, and the call's ``sm_scale`` is
    ``1 / head_dim``. Each query weighs distances itself: "rel_q" ``[batch, seq, heads,
    channels]`` is a projection of the token, "rel_table" ``[channels, near or extent]``
    is learned. The table of a window has a column for each of its distances.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.
      extent: distances with a bias in full layers.
      channels: channels of a head in "rel_q".
      floor: in full layers, queries and their biases at ``t`` are multiplied by ``1 +
        alpha * ln(max((t + 1) / floor, 1))``; None for no such factor.
      alpha: how fast the factor grows.

    Raises:
      ValueError: a number is below 1.

    Example:
      >>> from sadsl.catalog import models
      >>> print(models.inkling()[0])
      softmax(causal() & window(511), bias=query_distance_bias('rel_q', 'rel_table', 16,
      512))
    """
    return _layers(
        "inkling", num_layers, near, extent, channels, floor, alpha, sink=False
    )


def inkling_2(
    num_layers: int = 48,
    near: int = 1024,
    extent: int = 1024,
    channels: int = 16,
    floor: int | None = None,
    alpha: float = 0.1,
) -> tuple[Term, ...]:
    """Inkling 2: as Inkling, with a sink for each query and head.

    As in transformers 5.24: 48 query heads, 8 key heads; q, k and "rel_q" are clipped
    by their norms, values are normed, and the output has a gate. "sink" ``[batch, seq,
    heads]`` is a projection of the token. Attention over depth is not part of these
    specs. That Inkling 2 has the temperature of Inkling was not verified: the outputs
    of its code that the tests have show none.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.
      extent: distances with a bias in full layers.
      channels: channels of a head in "rel_q".
      floor: as in ``inkling``.
      alpha: as in ``inkling``.

    Raises:
      ValueError: a number is below 1.

    Example:
      >>> from sadsl.catalog import models
      >>> sorted(models.inkling_2()[5].operands)
      ['rel_q', 'rel_table', 'sink']
    """
    return _layers(
        "inkling_2", num_layers, near, extent, channels, floor, alpha, sink=True
    )


def _layers(
    name: str, num_layers: int, near: int, extent: int, channels: int,
    floor: int | None, alpha: float, *, sink: bool,
) -> tuple[Term, ...]:  # fmt: skip
    at_least(name, "near", near, 1)
    factor = None if floor is None else _temperature(name, floor, alpha)

    def of(seen: IndexMap, extent: int, factor: Bias | None) -> Term:
        added = query_distance_bias("rel_q", "rel_table", channels, extent, factor)
        return softmax(seen, bias=added, sink=sink, scale=factor)

    nearby = of(causal() & window(near - 1), near, None)
    return in_turn(name, nearby, num_layers, 6, of(causal(), extent, factor))


def _temperature(name: str, floor: int, alpha: float) -> Bias:
    """``1 + alpha * ln(max((t + 1) / floor, 1))`` of the query at ``t``."""
    at_least(name, "floor", floor, 1)
    base = 1.0 - alpha * math.log(floor)
    return bias(lambda q, k, h: base + alpha * log(maximum(q + 1, floor)))
