"""The heads of MMInference at modality boundaries, and the candidates of its search."""

from collections.abc import Mapping
from functools import reduce

from sadsl.catalog.a_shape import a_shape
from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window
from sadsl.selections.modalities import modalities
from sadsl.selections.vertical_slash import vertical_slash


def mminference_q_boundary(
    num_modalities: int = 2, vertical: int = 1000, slash: int = 2048
) -> IndexMap:
    """The queries of each modality have their own vertical-slash pattern.

    Li et al., MMInference: accelerating pre-filling for long-context VLMs via
    modality-aware permutation sparse attention, 2025, section 4. The pattern of a
    modality is estimated from the last 64 queries of its last span. The code permutes
    the queries to the same effect. Pass ``operands={"modality": ints [length]}``.

    Args:
      num_modalities: modalities, numbered from 0.
      vertical, slash: columns and offsets that each modality keeps.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.mminference_q_boundary(2, 100, 200))
      (modalities(0) & vertical_slash(100, 200, queries=0)) | (modalities(1) &
      vertical_slash(100, 200, queries=1))
    """
    parts = (
        modalities(m) & vertical_slash(vertical, slash, queries=m)
        for m in range(num_modalities)
    )
    return reduce(lambda a, b: a | b, parts)


def mminference_2d_boundary(
    num_modalities: int = 2,
    vertical: int = 1000,
    slash: int = 2048,
    patterns: Mapping[tuple[int, int], IndexMap] | None = None,
) -> IndexMap:
    """Each pair of a query's and a key's modality has its own pattern.

    By default the pattern is vertical-slash among the keys of the one modality,
    estimated from the last 64 queries of the other's last span. Pass
    ``operands={"modality": ints [length]}``.

    Li et al., MMInference, 2025, section 4. This is a reconstruction: the paper's code
    describes the pattern, but does not contain it.

    Args:
      num_modalities: modalities, numbered from 0.
      vertical, slash: columns and offsets that each pair keeps.
      patterns: other maps for some pairs, by ``(query modality, key modality)``.

    Example:
      >>> import sadsl as sa
      >>> from sadsl import catalog
      >>> near = {(0, 0): sa.window(8), (0, 1): sa.full(), (1, 0): sa.full()}
      >>> print(catalog.mminference_2d_boundary(2, 100, 200, patterns=near))
      causal() & ((modalities(0, keys=0) & window(8)) | (modalities(0, keys=1) & full())
      | (modalities(1, keys=0) & full()) | (modalities(1, keys=1) & vertical_slash(100,
      200, queries=1, keys=1)))
    """
    given = patterns or {}
    pairs = [(a, b) for a in range(num_modalities) for b in range(num_modalities)]

    def pattern(a: int, b: int) -> IndexMap:
        own = vertical_slash(vertical, slash, queries=a, keys=b)
        return modalities(a, b) & given.get((a, b), own)

    return causal() & reduce(lambda a, b: a | b, [pattern(*pair) for pair in pairs])


def mminference_candidates(
    vision: tuple[int, int], frame_stride: int, stride: int, *, local: int = 1024
) -> tuple[IndexMap, ...]:
    """The maps that MMInference's search tries, in the order of ``search_in_order``.

    Li et al., MMInference, 2025, section 4: an A-shape and vertical-slash maps; then
    columns alone, then columns and rows, that repeat in the vision span every frame or
    every ``stride`` positions, shifted by 0, by 1 and by all but one.

    Args:
      vision: start and stop of the vision span, in positions.
      frame_stride: positions of a frame.
      stride: the other period.
      local: nearest keys that the repeating maps add; the own position counts.

    Example:
      >>> from sadsl import catalog
      >>> found = catalog.mminference_candidates((4, 40), 6, 4, local=8)
      >>> len(found), found[1]
      (15, vertical_slash(1000, 1024, last=257))
    """
    start, stop = vision
    # Every query sees the keys before the span, as it sees the sinks of the grid.
    near = window(local - 1) | sinks(start)

    def lattice(step: int, shift: int, rows: bool) -> IndexMap:
        at = start + shift
        columns = where(lambda q, k: (k >= at) & (k < stop) & ((k - at) % step == 0))
        return near | columns | columns.T if rows else near | columns

    grids = [
        causal() & lattice(step, shift, rows)
        for rows in (False, True)
        for step in dict.fromkeys((frame_stride, stride))
        for shift in dict.fromkeys((0, 1, step - 1))
    ]
    slashes = [vertical_slash(1000, size, last=257) for size in (1024, 2048)]
    return a_shape(128, 4096), *slashes, *grids
