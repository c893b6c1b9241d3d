"""The prefix language model."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, prefix


def prefix_lm(num_prefix: int) -> IndexMap:
    """Causal, but all see the whole prefix.

    Raffel et al., Exploring the limits of transfer learning with a unified text-to-text
    transformer, 2020, section 3.2.1. For a prefix by batch row, use
    ``causal() | where(lambda q, k: k < operand("prefix"))``.
    """
    return causal() | prefix(num_prefix)
