"""The plan of a predicate by descent into every square of blocks, each by itself."""

import numpy as np

from lowering.planning import narrowest, widest
from lowering.ranges.ranges import Ranges, Rectangles
from lowering.ranges.refine import settle
from lowering.ranges.verdicts import Analysis
from pallas_kernels.block_mask import EMPTY, FULL, PARTIAL

SPLIT = 4


def kinds_by_descent(node, sizes):
    """The kind of every block, ``[query blocks, key blocks]``; nothing is shared."""
    upper, lower = widest(node), narrowest(node)
    rows, columns = sizes.num_blocks
    kinds = np.full((rows, columns), EMPTY)
    size = 1
    while size < max(rows, columns):
        size *= SPLIT
    i = j = np.zeros(1, np.int64)
    while len(i):
        at = sizes.elements(i, j, size)
        analysis = Analysis(Ranges(at, sizes.leaf))
        some, every = analysis(upper), analysis(lower)
        mixed = some.hits & every.misses
        if size == 1:
            mixed = mixed | (some.hit & every.miss)
        for which, kind in ((every.all, FULL), (mixed & ~every.all, PARTIAL)):
            for a, b in zip(i[which], j[which], strict=True):
                kinds[a : a + size, b : b + size] = kind
        rest = np.flatnonzero(~(every.all | mixed | some.none))
        if size == 1:
            part = Rectangles(*(x[rest] for x in at))
            pairs, full = settle(upper, lower, part, budget=None)
            kinds[i[rest], j[rest]] = np.where(
                pairs, np.where(full, FULL, PARTIAL), EMPTY
            )
            break
        size //= SPLIT
        steps = np.arange(SPLIT) * size
        i, j = (
            np.broadcast_to(x, (len(rest), SPLIT, SPLIT)).ravel()
            for x in (
                i[rest, None, None] + steps[:, None], j[rest, None, None] + steps
            )
        )  # fmt: skip
        inside = (i < rows) & (j < columns)
        i, j = i[inside], j[inside]
    if sizes.kv_seq_len % sizes.block_kv:
        kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)
    return kinds
