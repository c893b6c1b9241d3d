"""Dilated sliding windows."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import dilated


def dilated_window(
    window: int = 512, dilation: int = 2, *, is_causal: bool = False
) -> IndexMap:
    """``window // 2`` keys on either side, ``dilation`` apart, or as many before only.

    Beltagy et al., Longformer, 2020, section 3.1; the dilation has no published
    default (the paper's grows by layer, on two heads).
    """
    side = window // 2
    return dilated(side, 0 if is_causal else side, dilation)
