"""Published mechanisms: catalogue specs, beside loops written from the papers.

Numbers are chosen so that each of them matters at these sizes.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from sadsl import IndexMap, catalog
from sadsl.catalog.big_bird import random_blocks


class Case(NamedTuple):
    """A spec for a size, and its definition: ``allowed(size, n, h, i, j)``.

    A size is a length, or the shape of a grid. The second size has length 60.
    """

    name: str
    make: Callable[[Any], IndexMap]
    allowed: Callable[[Any, int, int, int, int], bool]
    sizes: tuple = (13, 60, 97)
    larger: Any = 160
    heads: int = 1
    extra: int = 0

    def length(self, size):
        return size if isinstance(size, int) else prod(size) + self.extra


# --- the definitions of the papers, one pair at a time ---


def power_attention(size, n, h, i, j):
    b = i // 3 - j // 3
    return j <= i and (b < 6 or (b & (b - 1)) == 0 or j // 3 < 2)


def s2(block, local, v, num_kv_heads, num_heads, offset=0, homo=False, dense=0):
    def allowed(size, n, h, i, j):
        head = h // (num_heads // num_kv_heads)
        if head >= num_kv_heads - dense:
            return j <= i
        phase = offset + (0 if homo else head * max(1, v // num_kv_heads))
        near = i // block - j // block < local
        return j <= i and (near or (j // block + phase) % v == 0)

    return allowed


def s2_bidirectional(size, n, h, i, j):
    row, column = i // 2, j // 2
    left = max(row - column - 2 + 1, 0)
    right = max(column - row - 3 + 1, 0)
    return (left + right) % 4 == 0


def radial(shape, n, h, i, j):
    frames, s = shape
    if i >= frames * s or j >= frames * s or j < s:
        return True
    distance, apart = abs(i // s - j // s), abs(i % s - j % s)
    p = 1
    while p * 2 <= distance:
        p *= 2
    near = p <= s and apart + 1 <= Fraction(s, p)
    return near or (distance % -(-p // s) == 0 and apart == 0)


SPANS = [(5, 0.25), (-22, 0.5)]


def moa(size, n, h, i, j):
    alpha, beta = SPANS[h]
    near = max(int(alpha / 4 + beta * n / 4), 1)
    return j <= i and (i // 4 - j // 4 < near or j // 4 < 1)


def a_shape(size, n, h, i, j):
    return j <= i and (j < 3 or i - j < 6)


def tri_shape(size, n, h, i, j):
    return a_shape(size, n, h, i, j) or (j <= i and i in range(n - 5, n))


def mminference_grid(size, n, h, i, j, start=3):
    """The worked example: blocks of 4, sink 2, local 4, a span up to 44, stride 3."""
    sink, local, total = 4, 4, 36
    queries = [x for x in range(sink + local, sink + local + total) if x % 3 == start]
    keys = [x for x in range(sink, sink + total) if x % 3 == start]
    tail = i >= sink + local + total
    return j <= i and (i - j < local or j < sink or tail or i in queries or j in keys)


def worked_grid(size, n, h, i, j):
    return mminference_grid(size, n, h, i, j, start=0)


def residue_order(n):
    zone = 4 + np.arange(36).reshape(12, 3).T.ravel()
    return [*range(4), *zone.tolist(), *range(40, n)]


def residue_major(size, n, h, i, j):
    order = residue_order(n)
    return worked_grid(size, n, h, order[i], order[j])


def modality_mutual(size, n, h, i, j):
    return j <= i or (3 <= i < 20 and 22 <= j < 31)


DOCUMENTS = (7, 11, 4, 9)


def pine(size, n, h, i, j):
    document = [-1] * 5 + [d for d, width in enumerate(DOCUMENTS) for _ in range(width)]
    document += [-1] * (n - len(document))
    other = document[i] >= 0 and document[j] >= 0 and document[i] != document[j]
    return j <= i or other


def coordinates(shape, x):
    return tuple(map(int, np.unravel_index(x, shape)))


def tiles(window):
    def allowed(shape, n, h, i, j):
        at = zip(coordinates(shape, i), coordinates(shape, j), window, strict=True)
        return all(a // w == b // w for a, b, w in at)

    return allowed


def neighbourhood(window, stride, dilation, causal):
    @cache
    def keys(i, length, w, s, d, is_causal):
        members = range(i % d, length, d)
        at, count = i // d, len(members)
        if is_causal:
            leader = min(at // s * s + s - 1, count - 1)
            found = range(max(leader - w + 1, 0), at + 1)
        else:
            leader = min(at // s * s + s // 2, count - 1)
            start = max(leader - w // 2, 0)
            overhang = leader + w // 2 + w % 2 - 1 - (count - 1)
            start -= max(overhang, 0)
            found = range(start, start + w)
        return {members[x] for x in found}

    def allowed(shape, n, h, i, j):
        at_i, at_j = coordinates(shape, i), coordinates(shape, j)
        rules = zip(at_i, shape, window, stride, dilation, causal, strict=True)
        return all(b in keys(*rule) for b, rule in zip(at_j, rules, strict=True))

    return allowed


def strided_parts(i, j, stride=5):
    return max(0, i - stride) <= j <= i, j <= i and (i - j) % stride == 0


def fixed_parts(i, j, stride=6, c=2):
    summary = j % stride in range(stride - c, stride)
    return j <= i and j // stride == i // stride, j <= i and summary


def split(parts):
    return lambda size, n, h, i, j: parts(i, j)[h]


def merged(parts):
    return lambda size, n, h, i, j: any(parts(i, j))


def longformer(size, n, h, i, j):
    d = (1, 3)[h // 2]
    near = [i + step * d for step in range(-3, 4)]
    return i < 2 or j < 2 or j in near


BIRD = {"num_blocks": 25, "side": 1, "num_global": 2, "num_random": 2, "seed": 1}


@cache
def drawn():
    return random_blocks(**BIRD)


def big_bird(size, n, h, i, j):
    row, column = i // 4, j // 4
    chosen = column in [blocks[row] for blocks in drawn()]
    return row < 2 or column < 2 or abs(row - column) <= 1 or chosen


def log_sparse(size, n, h, i, j):
    return j in {i} | {i - 2**p for p in range(8)}


def log_sparse_parts(size, n, h, i, j):
    near = i - 5 <= j <= i
    return i // 20 == j // 20 and (near or log_sparse(size, n, h, i, j))


def axial(shape, n, h, i, j):
    a, b = coordinates(shape, i), coordinates(shape, j)
    return all(a[x] == b[x] for x in range(len(shape)) if x != h)


def prefix_lm(size, n, h, i, j):
    return j <= i or j < 9


def dilated_window(is_causal):
    steps = range(-3, 1 if is_causal else 4)
    return lambda size, n, h, i, j: j in [i + 4 * step for step in steps]


def streaming(size, n, h, i, j):
    return j <= i and (j < 3 or j > i - 7)


# --- the same as specs, with numbers that matter at these sizes ---


def lattice():
    """The worked example of a grid."""
    return catalog.mminference_grid((3, 44), 3, sink=2, local=4, block=4)


VIDEOS = ((2, 5, 7), (3, 4, 5), (4, 4, 6))
FLAT = {
    "window": (3, 5), "stride": (1, 2), "dilation": (1, 1), "causal": (False, False),
}  # fmt: skip
DILATED = {
    "window": (2, 3), "stride": (1, 2), "dilation": (2, 3), "causal": (False, True),
}  # fmt: skip
VIDEO = {
    "window": (2, 3, 3), "stride": (1, 2, 1), "dilation": (1, 1, 1),
    "causal": (True, False, False),
}  # fmt: skip
LINE = {"window": (6,), "stride": (4,), "dilation": (1,), "causal": (False,)}

CASES = (
    Case("power_attention", lambda n: catalog.power_attention(3, 6, 2),
         power_attention),
    Case("s2", lambda n: catalog.s2_attention(2, 3, 2, 5), s2(3, 2, 5, 2, 4), heads=4),
    Case(
        "s2 options",
        lambda n: catalog.s2_attention(
            3, 2, 3, 4, offset=1, homo_head=True, num_dense_heads=1
        ),
        s2(2, 3, 4, 3, 3, 1, True, 1),
        heads=3,
    ),
    Case("s2_bidirectional", lambda n: catalog.s2_bidirectional(2, 3, 4, 2),
         s2_bidirectional),
    Case("radial", lambda shape: catalog.radial(*shape), radial,
         ((17, 3), (20, 3), (32, 3)), (31, 3)),
    Case("radial with text", lambda shape: catalog.radial(*shape, text_tokens=5),
         radial, ((9, 5), (11, 5), (16, 5)), (15, 5), extra=5),
    Case("moa", lambda n: catalog.moa(SPANS, 4), moa, (11, 60, 91),
         heads=2),
    Case("a_shape", lambda n: catalog.a_shape(3, 6), a_shape),
    Case("tri_shape", lambda n: catalog.tri_shape(3, 6, 5), tri_shape),
    Case("mminference_grid", lambda n: lattice(), worked_grid, (48, 60, 97)),
    Case("residue_major", lambda n: catalog.residue_major(lattice(), (4, 40), 3, n),
         residue_major, (48, 60, 97)),
    Case("modality_mutual", lambda n: catalog.modality_mutual((3, 20), (22, 31)),
         modality_mutual),
    Case("pine", lambda n: catalog.pine(5, DOCUMENTS), pine, (40, 60, 97)),
    Case("swapped_window", lambda shape: catalog.swapped_window(shape, (2, 2, 3)),
         tiles((2, 2, 3)), VIDEOS, (5, 5, 7)),
    Case("swapped_window sliding",
         lambda shape: catalog.swapped_window(shape, (2, 3, 4), sliding=True),
         neighbourhood((2, 3, 4), (1,) * 3, (1,) * 3, (False,) * 3),
         ((3, 5, 6), (3, 4, 5), (4, 4, 6)), (5, 5, 7)),
    Case("sparse_transformer_strided", lambda n: catalog.sparse_transformer_strided(5),
         split(strided_parts), heads=2),
    Case("sparse_transformer_strided merged",
         lambda n: catalog.sparse_transformer_strided(5, by_head=False),
         merged(strided_parts)),
    Case("sparse_transformer_fixed", lambda n: catalog.sparse_transformer_fixed(6, 2),
         split(fixed_parts), heads=2),
    Case("sparse_transformer_fixed merged",
         lambda n: catalog.sparse_transformer_fixed(6, 2, by_head=False),
         merged(fixed_parts)),
    Case("longformer", lambda n: catalog.longformer(6, (1, 3), 2), longformer, heads=4),
    Case("big_bird", lambda n: catalog.big_bird(25, 4, num_random=2, seed=1), big_bird,
         larger=100),
    Case("log_sparse", lambda n: catalog.log_sparse(), log_sparse),
    Case("log_sparse in parts", lambda n: catalog.log_sparse(5, 20), log_sparse_parts),
    Case("axial", lambda shape: catalog.axial(h=shape[0], w=shape[1]), axial,
         ((5, 7), (6, 10), (8, 9)), (9, 11), heads=2),
    Case("prefix_lm", lambda n: catalog.prefix_lm(9), prefix_lm),
    Case("dilated_window", lambda n: catalog.dilated_window(6, 4),
         dilated_window(False)),
    Case("dilated_window causal",
         lambda n: catalog.dilated_window(6, 4, is_causal=True), dilated_window(True)),
    Case("streaming", lambda n: catalog.streaming(3, 7), streaming),
    Case("neighborhood 1-D", lambda shape: catalog.neighborhood(shape, **LINE),
         neighbourhood(**LINE), ((14,), (60,), (95,)), (131,)),
    Case("neighborhood 2-D", lambda shape: catalog.neighborhood(shape, **FLAT),
         neighbourhood(**FLAT), ((7, 8), (6, 10), (9, 9)), (8, 12)),
    Case("neighborhood 2-D dilated",
         lambda shape: catalog.neighborhood(shape, **DILATED),
         neighbourhood(**DILATED), ((8, 10), (6, 10), (6, 13)), (8, 14)),
    Case("neighborhood 3-D", lambda shape: catalog.neighborhood(shape, **VIDEO),
         neighbourhood(**VIDEO), ((3, 6, 5), (3, 4, 5), (4, 4, 6)), (5, 6, 7)),
    Case("davit_window", lambda shape: catalog.davit_window(*shape, 3), tiles((3, 3)),
         ((7, 9), (6, 10), (9, 9)), (11, 13)),
)  # fmt: skip


@cache
def expected(name, size):
    """The pairs of a case by its oracle, bool ``[heads, n, n]``."""
    case = next(c for c in CASES if c.name == name)
    n = case.length(size)
    cells = range(n)
    rows = [
        [[case.allowed(size, n, h, i, j) for j in cells] for i in cells]
        for h in range(case.heads)
    ]
    return np.array(rows)
