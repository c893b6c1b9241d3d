"""AnchorAttention: keeps the keys whose scores come close to those of an anchor."""

from sadsl.maps.base import IndexMap
from sadsl.selections.stripes import stripes


def anchor_attention(
    theta: float = 12.0, *, init: int = 128, block: int = 128, step: int = 16
) -> IndexMap:
    """A query sees the first keys, its own group of blocks, and high-scoring stripes.

    A group is ``block * step`` queries. The anchor of a query is its greatest score
    among the first keys and the keys of its group. A stripe is a key whose score, for
    the mean query of some block of the group, comes within ``theta`` of the mean
    anchor: the whole group sees it. One softmax covers all of them.

    Zhang et al., AnchorAttention: difference-aware sparse attention with stripe
    granularity, 2025, section 3. The defaults are the code's, whose mask has 128 first
    keys (its second kernel has a multiple of ``block * step``).

    Args:
      theta: how far below the anchor a stripe's score may be, in natural-log units.
      init: first keys that every query sees.
      block: positions in a block.
      step: blocks in a group of queries.

    Example:
      >>> from sadsl import catalog
      >>> catalog.anchor_attention(6.0)
      stripes(theta=6.0)
    """
    return stripes(theta, init=init, block=block, step=step)
