"""Axial attention: one axis of a grid at a time."""

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.grids import Grid


def axial(**sizes: int) -> IndexMap:
    """Head group ``i`` attends along the ``i``-th axis of ``Grid(**sizes)``.

    Ho et al., Axial attention in multidimensional transformers, 2019, section 3, which
    alternates the axes by layer: there, use ``Grid(...).axial(name)``.
    """
    grid = Grid(**sizes)
    return per_head(*(grid.axial(name) for name in grid.names))
