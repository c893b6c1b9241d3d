"""Neighbourhood attention on sequences, images and videos."""

from sadsl.maps.base import IndexMap
from sadsl.maps.grids import Grid, PerAxis

AXES = ("t", "h", "w")


def neighborhood(
    shape: tuple[int, ...] = (56, 56),
    window: PerAxis = 7,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
) -> IndexMap:
    """The ``window`` nearest cells along each axis of a sequence, image or video.

    Hassani et al., Neighborhood attention transformer, 2023, section 3 (7 x 7 windows,
    whose defaults these are, on 56 x 56 cells in its first level); Hassani and Shi,
    Dilated neighborhood attention transformer, 2022; Hassani et al., Generalized
    neighborhood attention, 2025 (``stride``). See ``Grid.neighborhood``.
    """
    if not 1 <= len(shape) <= len(AXES):
        raise ValueError(
            f"neighborhood: shape={shape} must have 1 to {len(AXES)} axes, for "
            "(t, h, w): use Grid(...).neighborhood for others"
        )
    grid = Grid(**dict(zip(AXES[-len(shape) :], shape, strict=True)))
    return grid.neighborhood(window, stride, dilation, causal)
