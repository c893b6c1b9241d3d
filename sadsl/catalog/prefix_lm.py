"""The prefix language model."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, prefix


def prefix_lm(num_prefix: int) -> IndexMap:
    """Causal, but every query sees the whole prefix.

    Raffel et al., Exploring the limits of transfer learning with a unified text-to-text
    transformer, 2020, section 3.2.1. Where prefixes differ by batch row, use ``causal()
    | where(lambda q, k: k < operand("prefix"))``.

    Args:
      num_prefix: tokens of the prefix.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.prefix_lm(2).dense(4)[0].astype(int))
      [[1 1 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 1 1]]
    """
    return causal() | prefix(num_prefix)
