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
    """A cell sees the ``window`` nearest cells along each axis of a grid.

    Hassani et al., Neighborhood attention transformer, 2023, section 3 (7 x 7 windows,
    whose defaults these are, on 56 x 56 cells in its first level); Hassani and Shi,
    Dilated neighborhood attention transformer, 2022; Hassani et al., Generalized
    neighborhood attention, 2025 (``stride``).

    Args:
      shape: cells along each axis of a sequence (w), image (h, w) or video (t, h, w).
      window, stride, dilation, causal: one for all axes, or one for each; see
        ``Grid.neighborhood``.

    Raises:
      ValueError: ``shape`` has no axis, or more than three.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.neighborhood((6,), window=3).dense(6)[0].astype(int))
      [[1 1 1 0 0 0]
       [1 1 1 0 0 0]
       [0 1 1 1 0 0]
       [0 0 1 1 1 0]
       [0 0 0 1 1 1]
       [0 0 0 1 1 1]]
    """
    if not 1 <= len(shape) <= len(AXES):
        raise ValueError(
            f"neighborhood: shape={shape} must have 1 to {len(AXES)} axes, for "
            "(t, h, w): use Grid(...).neighborhood for others"
        )
    grid = Grid(**dict(zip(AXES[-len(shape) :], shape, strict=True)))
    return grid.neighborhood(window, stride, dilation, causal)
