"""The spatial windows of DaViT's dual attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.grids import Grid
from sadsl.maps.named import blocks


def davit_window(height: int = 56, width: int = 56, window: int = 7) -> IndexMap:
    """A cell of an image sees the cells of its own ``window`` x ``window`` tile.

    Ding et al., DaViT: dual attention vision transformers, 2022, section 3. The code
    pads the image with zeros to a multiple of the window, and attends to the padding:
    to do the same, pad first and give the padded sizes. Its channel attention is
    ``davit_channel``.

    Args:
      height, width: cells of the image; positions are row-major.
      window: cells along each side of a tile.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.davit_window(2, 4, window=2).dense(8)[0].astype(int))
      [[1 1 0 0 1 1 0 0]
       [1 1 0 0 1 1 0 0]
       [0 0 1 1 0 0 1 1]
       [0 0 1 1 0 0 1 1]
       [1 1 0 0 1 1 0 0]
       [1 1 0 0 1 1 0 0]
       [0 0 1 1 0 0 1 1]
       [0 0 1 1 0 0 1 1]]
    """
    return Grid(h=height, w=width).product(h=blocks(window), w=blocks(window))
