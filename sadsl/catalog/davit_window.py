"""The spatial windows of DaViT's dual attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.grids import Grid
from sadsl.maps.named import blocks


def davit_window(height: int = 56, width: int = 56, window: int = 7) -> IndexMap:
    """Cells of an image see those of their own ``window`` x ``window`` tile.

    Ding et al., DaViT: dual attention vision transformers, 2022, section 3. The code
    pads the image with zeros to a multiple of the window and attends to the padding:
    pad before, and give the padded sizes. Its channel attention is ``davit_channel``.
    """
    return Grid(h=height, w=width).product(h=blocks(window), w=blocks(window))
