"""Swapped cross-attention of VideoFactory in windows of space and time."""

from sadsl.maps.base import IndexMap
from sadsl.maps.grids import Grid
from sadsl.maps.named import blocks


def swapped_window(
    shape: tuple[int, int, int], window: tuple[int, int, int], *, sliding: bool = False
) -> IndexMap:
    """Queries see the keys in a (time, height, width) ``window`` that holds them.

    Wang et al., VideoFactory: swap attention in spatiotemporal diffusions for
    text-to-video generation, 2023, section 3. Queries are spatial features and keys
    temporal ones, or the other way round in the next layer: the map is the same. That
    there are 3-D windows is published; their size, and whether they tile the video
    (here, unless ``sliding``) or slide, is unverified.
    """
    grid = Grid(t=shape[0], h=shape[1], w=shape[2])
    if sliding:
        return grid.neighborhood(window)
    t, h, w = (blocks(size) for size in window)
    return grid.product(t=t, h=h, w=w)
