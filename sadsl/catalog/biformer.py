"""BiFormer: regions choose regions, and tokens attend within the chosen ones."""

from sadsl.maps.base import IndexMap
from sadsl.selections import tiles, topk


def biformer(grid: tuple[int, int], k: int, *, regions: int = 7) -> IndexMap:
    """Each region of a feature map sees the ``k`` regions with the best mean score.

    Zhu et al., BiFormer: vision transformer with bi-level routing attention, 2023,
    section 3.2. Regions are compared by their mean queries and keys over all heads, and
    all heads share one choice; a region need not choose itself. The paper's ``k`` grows
    by stage (1, 4, 16, then all).

    Where the sides do not divide by ``regions``, the last regions are smaller. The code
    pads with zeros instead, and attends to them. It also scales by the width of all
    heads: ``sm_scale=(num_heads * d) ** -0.5``.

    Args:
      grid: height and width of the feature map, in tokens.
      k: regions that each region sees.
      regions: regions along each side.

    Example:
      >>> from sadsl import catalog
      >>> catalog.biformer((8, 8), k=2, regions=4)
      topk(2, block=tiles((8, 8), (2, 2)), scope='shared')
    """
    region = tiles(grid, tuple(-(-side // regions) for side in grid))
    return topk(k, block=region, scope="shared")
