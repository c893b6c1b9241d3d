"""AnchorAttention: stripes that come near to the best of the first and local keys."""

from sadsl.maps.base import IndexMap
from sadsl.selections.stripes import stripes


def anchor_attention(
    theta: float = 12.0, *, init: int = 128, block: int = 128, step: int = 16
) -> IndexMap:
    """The first keys, the group of ``block * step`` queries, and stripes near to them.

    Zhang et al., AnchorAttention: difference-aware sparse attention with stripe
    granularity, 2025, section 3; the defaults are the code's, whose mask has 128 first
    keys (its second kernel has a multiple of ``block * step``). One softmax over all.
    """
    return stripes(theta, init=init, block=block, step=step)
