"""Dilated sliding windows."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import dilated


def dilated_window(
    window: int = 512, dilation: int = 2, *, is_causal: bool = False
) -> IndexMap:
    """A query sees ``window // 2`` keys on either side, each ``dilation`` apart.

    Beltagy et al., Longformer, 2020, section 3.1. The dilation has no published default
    (the paper's grows by layer, on two heads).

    Args:
      window: keys on both sides together.
      dilation: distance between neighbouring keys, in tokens.
      is_causal: keeps only the ``window // 2`` keys before the query, and its own.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.dilated_window(4, 2).dense(8)[0].astype(int))
      [[1 0 1 0 1 0 0 0]
       [0 1 0 1 0 1 0 0]
       [1 0 1 0 1 0 1 0]
       [0 1 0 1 0 1 0 1]
       [1 0 1 0 1 0 1 0]
       [0 1 0 1 0 1 0 1]
       [0 0 1 0 1 0 1 0]
       [0 0 0 1 0 1 0 1]]
    """
    side = window // 2
    return dilated(side, 0 if is_causal else side, dilation)
