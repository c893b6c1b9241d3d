"""Swapped cross-attention of VideoFactory in windows of space and time."""

from sadsl.maps.base import IndexMap
from sadsl.maps.grids import Grid
from sadsl.maps.named import blocks


def swapped_window(
    shape: tuple[int, int, int], window: tuple[int, int, int], *, sliding: bool = False
) -> IndexMap:
    """A query sees the keys of its own window in time, height and width.

    Wang et al., VideoFactory: swap attention in spatiotemporal diffusions for
    text-to-video generation, 2023, section 3. Queries are spatial features and keys
    temporal ones, or the other way round in the next layer: the map is the same. That
    there are 3-D windows is published. Their size, and whether they tile the video or
    slide, is unverified.

    Args:
      shape: frames, height and width of the video; positions are row-major.
      window: frames, height and width of a window.
      sliding: moves the window with the query, instead of tiling the video.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.swapped_window((2, 2, 2), (1, 2, 2)).dense(8)[0].astype(int))
      [[1 1 1 1 0 0 0 0]
       [1 1 1 1 0 0 0 0]
       [1 1 1 1 0 0 0 0]
       [1 1 1 1 0 0 0 0]
       [0 0 0 0 1 1 1 1]
       [0 0 0 0 1 1 1 1]
       [0 0 0 0 1 1 1 1]
       [0 0 0 0 1 1 1 1]]
    """
    grid = Grid(t=shape[0], h=shape[1], w=shape[2])
    if sliding:
        return grid.neighborhood(window)
    t, h, w = (blocks(size) for size in window)
    return grid.product(t=t, h=h, w=w)
