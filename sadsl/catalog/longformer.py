"""Longformer: sliding windows, dilated by head, and global tokens."""

from collections.abc import Sequence

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import dilated, sinks


def longformer(
    window: int = 512, dilations: Sequence[int] = (1,), num_global: int = 1
) -> IndexMap:
    """A query sees ``window // 2`` keys on either side, and all global tokens.

    Beltagy et al., Longformer: the long-document transformer, 2020, section 3.1. Global
    tokens also see everything. The released models have no dilation.

    Args:
      window: keys on both sides together.
      dilations: head ``i`` (or equal head group) spreads its window ``dilations[i]``
        times as far.
      num_global: first tokens that are global: one for classification, the question for
        question answering.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.longformer(2).dense(6)[0].astype(int))
      [[1 1 1 1 1 1]
       [1 1 1 0 0 0]
       [1 1 1 1 0 0]
       [1 0 1 1 1 0]
       [1 0 0 1 1 1]
       [1 0 0 0 1 1]]
    """
    every = sinks(num_global) | sinks(num_global).T
    near = [dilated(window // 2, window // 2, d) for d in dilations]
    return per_head(*(part | every for part in near))
