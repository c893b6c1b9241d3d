"""BiFormer: regions choose regions, tokens attend in them."""

from sadsl.maps.base import IndexMap
from sadsl.selections import tiles, topk


def biformer(grid: tuple[int, int], k: int, *, regions: int = 7) -> IndexMap:
    """A region of a feature map sees the ``k`` regions nearest to it on average.

    Zhu et al., BiFormer: vision transformer with bi-level routing attention, 2023,
    section 3.2; there are ``regions`` along each side, and ``k`` grows by stage (1, 4,
    16, then all). Regions are compared by their mean queries and keys over all heads,
    which choose as one; the own region is not forced. Where the sides do not divide,
    the last regions are smaller, while the code pads with zeros that are attended to.
    Its code scales by the width of all heads: ``sm_scale=(num_heads * d) ** -0.5``.
    """
    region = tiles(grid, tuple(-(-side // regions) for side in grid))
    return topk(k, block=region, scope="shared")
