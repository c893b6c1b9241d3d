"""Hybrids of a delta rule and full attention: Qwen3-Next, Kimi Linear, OLMo, Ling."""

from sadsl.catalog.delta_rules import gated_delta_net, kimi_delta
from sadsl.maps.base import at_least
from sadsl.maps.named import causal
from sadsl.terms.base import Term
from sadsl.terms.softmax import softmax

FULL = softmax(causal())


def in_turn(
    name: str,
    most: Term,
    num_layers: int,
    period: int,
    full: Term = FULL,
    first: int | None = None,
) -> tuple[Term, ...]:
    """One of ``period`` layers is ``full``, all others are ``most``.

    ``first`` is the first full layer, counted from 0; the last one of a period if None.

    Example:
      >>> [type(x).__name__ for x in in_turn("two", gated_delta_net(), 2, 2)]
      ['Delta', 'Softmax']
    """
    at_least(name, "num_layers", num_layers, 1)
    at_least(name, "period", period, 1)
    at = period - 1 if first is None else first
    return tuple(full if i % period == at else most for i in range(num_layers))


def qwen3_next(num_layers: int = 48) -> tuple[Term, ...]:
    """Qwen3-Next: three layers of Gated DeltaNet, one of full attention, and so on.

    Of Qwen3-Next-80B-A3B (Qwen team, 2025), as in transformers 5.24: 16 key heads and
    32 value heads of 128 in the linear layers; 16 query heads and 2 key heads of 256 in
    the others. Qwen3.5 has the same two layers, 32 of them.

    Args:
      num_layers: layers of the stack.

    Raises:
      ValueError: there is no layer.

    Example:
      >>> from sadsl.catalog import models
      >>> sum(repr(term) == "softmax(causal())" for term in models.qwen3_next())
      12
    """
    return in_turn("qwen3_next", gated_delta_net(), num_layers, 4)


def kimi_linear(num_layers: int = 27) -> tuple[Term, ...]:
    """Kimi Linear: three layers of Kimi delta attention, one of full attention.

    Kimi Team, Kimi Linear, 2025, section 4, as in transformers 5.24: full attention
    (MLA without rotary positions) in layers 4, 8, ..., 24 of 27, counted from 1; the
    linear layers have 32 heads of 128 and an unbounded gate.

    Args:
      num_layers: layers of the stack.

    Raises:
      ValueError: there is no layer.

    Example:
      >>> from sadsl.catalog import models
      >>> layers = models.kimi_linear()
      >>> [i + 1 for i, x in enumerate(layers) if repr(x) == "softmax(causal())"]
      [4, 8, 12, 16, 20, 24]
    """
    return in_turn("kimi_linear", kimi_delta(), num_layers, 4)


def olmo_hybrid(num_layers: int = 32, period: int = 4) -> tuple[Term, ...]:
    """OLMo-Hybrid: Gated DeltaNet whose betas reach 2, and full attention.

    As in transformers 5.24: keys of 96 and values of 192 channels, the norm's epsilon
    1e-5; ``sadsl.layers.nnx.GatedDeltaNet(..., negative=True)``. The number of layers
    and the period are a reconstruction: they were not verified in a source.

    Args:
      num_layers: layers of the stack.
      period: every so many layers, one has full attention.

    Raises:
      ValueError: there is no layer, or no period.

    Example:
      >>> from sadsl.catalog import models
      >>> len(set(models.olmo_hybrid(8)))
      2
    """
    return in_turn("olmo_hybrid", gated_delta_net(), num_layers, period)


def bailing_hybrid(num_layers: int = 42) -> tuple[Term, ...]:
    """Ling-3: five layers of Kimi delta attention, one of full attention (MLA).

    As in transformers 5.24: the gate of the linear layers is bounded by -5 and
    projected at full rank; ``sadsl.layers.nnx.KimiDelta(..., low_rank=False,
    lower=-5.0)``.

    Args:
      num_layers: layers of the stack.

    Raises:
      ValueError: there is no layer.

    Example:
      >>> from sadsl.catalog import models
      >>> sum(repr(term) == "softmax(causal())" for term in models.bailing_hybrid())
      7
    """
    return in_turn("bailing_hybrid", kimi_delta(), num_layers, 6)
