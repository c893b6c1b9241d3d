"""Longformer: sliding windows, dilated by head, and global tokens."""

from collections.abc import Sequence

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import dilated, sinks


def longformer(
    window: int = 512, dilations: Sequence[int] = (1,), num_global: int = 1
) -> IndexMap:
    """``window // 2`` keys on either side, and global tokens that see and are seen.

    Beltagy et al., Longformer: the long-document transformer, 2020, section 3.1. Head
    ``i`` (or equal head group) reaches ``dilations[i]`` times as far; the released
    models have none. The first ``num_global`` tokens are global: one for
    classification, the question for question answering.
    """
    every = sinks(num_global) | sinks(num_global).T
    near = [dilated(window // 2, window // 2, d) for d in dilations]
    return per_head(*(part | every for part in near))
