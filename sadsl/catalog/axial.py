"""Axial attention: each head attends along one axis of a grid."""

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.grids import Grid


def axial(**sizes: int) -> IndexMap:
    """Head group ``i`` attends along the ``i``-th axis of ``Grid(**sizes)``.

    Ho et al., Axial attention in multidimensional transformers, 2019, section 3. The
    paper alternates the axes by layer: for that, use ``Grid(...).axial(name)`` in each
    layer.

    Args:
      **sizes: cells along each named axis; positions are row-major.

    Example:
      >>> from sadsl import catalog
      >>> along_h, along_w = catalog.axial(h=2, w=3).dense(6, num_heads=2)
      >>> print(along_h.astype(int))
      [[1 0 0 1 0 0]
       [0 1 0 0 1 0]
       [0 0 1 0 0 1]
       [1 0 0 1 0 0]
       [0 1 0 0 1 0]
       [0 0 1 0 0 1]]
      >>> print(along_w.astype(int))
      [[1 1 1 0 0 0]
       [1 1 1 0 0 0]
       [1 1 1 0 0 0]
       [0 0 0 1 1 1]
       [0 0 0 1 1 1]
       [0 0 0 1 1 1]]
    """
    grid = Grid(**sizes)
    return per_head(*(grid.axial(name) for name in grid.names))
