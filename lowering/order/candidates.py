"""Generates candidate orders of positions: some digits first, the others in tiles."""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import prod
from typing import NamedTuple

from lowering.order.digits import Side
from lowering.order.layout import Axis, Layout

# A tile must not pad the positions to more than this many times their number.
MOST_PADDING = 1.25


class Layouts(NamedTuple):
    """The orders of the queries and of the keys."""

    q: Layout
    kv: Layout


def given(sides: Sequence[Side]) -> Layouts:
    """The given order of positions."""
    q, kv = sides
    return Layouts(_front(q, ()), _front(kv, ()))


def fronts(sides: tuple[Side, Side]) -> Iterator[Layouts]:
    """Candidates with some digits before all others, on both sides or on one."""
    q, kv = sides
    # The lengths may differ, as in decoding: the lower digits have to agree.
    alike = q.radices[1:] == kv.radices[1:]
    for chosen in _subsets(len(kv.radices)):
        if alike:
            yield Layouts(_front(q, chosen), _front(kv, chosen))
        yield Layouts(_front(q, ()), _front(kv, chosen))
    for chosen in _subsets(len(q.radices)):
        yield Layouts(_front(q, chosen), _front(kv, ()))


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """The sets of digits to put first: one or two digits, or all but one."""
    some = range(count)
    for size in range(1, count):
        if size <= 2 or size >= count - 1:
            yield from combinations(some, size)


def _front(side: Side, chosen: tuple[int, ...]) -> Layout:
    rest = [i for i in range(len(side.radices)) if i not in chosen]
    return Layout(side.length, side.axes, (*chosen, *rest))


def tiled(layouts: Layouts, tile: int) -> Iterator[Layouts]:
    """Candidates that keep the leading digits of ``layouts`` and tile the others."""
    if layouts.q == layouts.kv:
        for cut in _tiles(layouts.q, tile):
            yield Layouts(cut, cut)
        return
    for kv in _tiles(layouts.kv, tile):
        yield Layouts(layouts.q, kv)
    for q in _tiles(layouts.q, tile):
        yield Layouts(q, layouts.kv)


def _tiles(layout: Layout, tile: int) -> Iterator[Layout]:
    """Tilings of ``tile`` positions, with a power of two along every axis.

    An axis is cut in its most significant digit that does not lead; its less
    significant digits stay inside of the tile.
    """
    inner = _not_leading(layout)
    if len(inner) < 2:
        return
    for cuts in product(*(_cuts(layout, group, tile) for group in inner)):
        if prod(cuts) == tile:
            cut = _cut(layout, inner, cuts)
            if cut.num_slots <= MOST_PADDING * layout.length:
                yield cut


def _not_leading(layout: Layout) -> list[list[int]]:
    """The digits of each axis that were not put first, as one list an axis."""
    count = len(layout.order)
    descents = [i for i in range(1, count) if layout.order[i] < layout.order[i - 1]]
    rest = set(layout.order[descents[-1] :] if descents else layout.order)
    groups, first = [], 0
    for axis in layout.axes:
        own = range(first, first + len(axis.radices))
        groups.append([i for i in own if i in rest])
        first += len(axis.radices)
    return [g for g in groups if g]


def _cuts(layout: Layout, group: list[int], tile: int) -> list[int]:
    """The possible extents of a tile along one axis, whose digits are ``group``."""
    fixed = prod(layout.radices[i] for i in group[1:])
    extent = layout.radices[group[0]]
    # Only the most significant digit of an axis can be padded.
    pads = group[0] in _firsts(layout)
    sizes, part = [fixed], 2
    while fixed * part <= tile and part < 2 * extent:
        if pads or extent % part == 0:
            sizes.append(fixed * part)
        part *= 2
    return sizes


def _firsts(layout: Layout) -> set[int]:
    """The most significant digit of each axis."""
    return {
        sum(len(axis.radices) for axis in layout.axes[:i])
        for i in range(len(layout.axes))
    }


def _cut(layout: Layout, groups: list[list[int]], cuts: tuple[int, ...]) -> Layout:
    """Cuts the first digit of each group in two: the tile, and the place in it."""
    part_of = {}
    for group, size in zip(groups, cuts, strict=True):
        part_of[group[0]] = size // prod(layout.radices[i] for i in group[1:])
    axes, new_index, outer, count, old = [], {}, {}, 0, 0
    for axis in layout.axes:
        radices: list[int] = []
        for radix in axis.radices:
            if old in part_of:
                outer[old] = count + len(radices)
                radices.append(-(-radix // part_of[old]))
                radix = part_of[old]
            new_index[old] = count + len(radices)
            radices.append(radix)
            old += 1
        axes.append(Axis(axis.size, tuple(radices)))
        count += len(radices)
    inner = [i for group in groups for i in group]
    lead = [new_index[i] for i in layout.order if i not in inner]
    order = (*lead, *(outer[g[0]] for g in groups), *(new_index[i] for i in inner))
    return Layout(layout.length, tuple(axes), order)
