"""Heads of MMInference at the boundaries of modalities, and what its search tries."""

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
    """Every modality has a vertical-slash pattern of its own for its queries.

    Li et al., MMInference: accelerating pre-filling for long-context VLMs via
    modality-aware permutation sparse attention, 2025, section 4: that of a modality is
    estimated from the last 64 queries of its last span. The code permutes the queries
    to the same effect. Pass ``operands={"modality": ints [length]}``.
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
    """Every pair of modalities, of the query and of the key, has a pattern of its own.

    Li et al., MMInference, 2025, section 4, a reconstruction: the code describes it,
    but does not have it. Where ``patterns[query modality, key modality]`` does not say
    otherwise, it is vertical-slash among the keys of that modality, by the last 64
    queries of the other's last span.
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
    """What the search of the code tries, in its order (``search_in_order``).

    Li et al., MMInference, 2025, section 4: an A-shape and vertical-slash maps, then
    columns alone, or columns and rows, that repeat in the vision span every frame or
    every ``stride`` positions, shifted by 0, 1 or all but one.
    """
    start, stop = vision
    # The keys before the span are seen by all, as the grid's sinks are.
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
