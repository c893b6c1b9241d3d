"""Hybrids of linear and full attention: MiniMax-01, Nemotron-H."""

from sadsl.catalog.fixed_decays import minimax_lightning
from sadsl.catalog.gated_linear import mamba2
from sadsl.maps.base import at_least
from sadsl.maps.named import causal
from sadsl.terms.base import Term
from sadsl.terms.softmax import softmax

# Of Nemotron-H-8B: M is Mamba-2, * attention, - a feed-forward layer.
NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


def minimax_01(
    num_layers: int = 80, num_heads: int = 64, period: int = 8
) -> tuple[Term, ...]:
    """MiniMax-01 and M1: seven layers of Lightning attention, one of full attention.

    MiniMax, MiniMax-01: scaling foundation models with Lightning attention, 2025,
    section 2. Slopes depend on the head and on the layer: see ``minimax_lightning``.

    Args:
      num_layers: layers of the stack. (80 and the 64 heads were not verified in the
        model's files.)
      num_heads: heads of the linear layers.
      period: every so many layers, one has full attention; 2 is the default of the
        class in transformers.

    Raises:
      ValueError: there is no layer, no head, or no period.

    Example:
      >>> from sadsl.catalog import models
      >>> [type(term).__name__ for term in models.minimax_01(4, 2, period=2)]
      ['Linear', 'Softmax', 'Linear', 'Softmax']
    """
    at_least("minimax_01", "num_layers", num_layers, 1)
    at_least("minimax_01", "period", period, 1)
    full = softmax(causal())
    return tuple(
        minimax_lightning(num_heads, i, num_layers) if (i + 1) % period else full
        for i in range(num_layers)
    )


def nemotron_h(pattern: str = NEMOTRON_H_8B) -> tuple[Term, ...]:
    """Nemotron-H: Mamba-2, and a few layers of full attention without positions.

    NVIDIA, Nemotron-H: a family of accurate and efficient hybrid Mamba-transformer
    models, 2025, section 2. A feed-forward layer has no spec, so the tuple is shorter
    than the pattern.

    Args:
      pattern: a letter for each layer: "M" Mamba-2, "*" attention, "-" or "E" a
        feed-forward layer; that of the 8B model is the default.

    Raises:
      ValueError: the pattern has another letter.

    Example:
      >>> from sadsl.catalog import models
      >>> layers = models.nemotron_h()
      >>> len(layers), sum(repr(term) == "softmax(causal())" for term in layers)
      (28, 4)
      >>> models.nemotron_h("M-*")[0]
      linear('identity', decay='g', normalise=False)
    """
    kinds = {"M": mamba2(), "*": softmax(causal()), "-": None, "E": None}
    unknown = sorted(set(pattern) - set(kinds))
    if unknown:
        raise ValueError(
            f"pattern={pattern!r} has {unknown[0]!r}: letters are M (Mamba-2), * "
            "(attention), - and E (feed-forward)"
        )
    found = (kinds[letter] for letter in pattern)
    return tuple(term for term in found if term is not None)
