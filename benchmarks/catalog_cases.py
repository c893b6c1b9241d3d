"""Every static mechanism of the catalogue as it was published, at a chosen length.

``cases(1)`` has about 65,536 positions and ``cases(16)`` about 1,048,576. Windows,
strides, blocks and numbers of sinks keep their published values. What describes the
input grows with its length: frames and the sides of grids by the roots of ``growth``,
documents and modalities by ``growth``. Where there is no published default (where a
modality begins, how long documents are, which spans a search found), the value is
chosen here and a comment says so.
"""

from math import isqrt
from typing import NamedTuple

from sadsl import IndexMap, catalog

N = 65_536


class Case(NamedTuple):
    """A map, with the length and the number of heads that it is made for."""

    name: str
    spec: IndexMap
    n: int = N
    num_heads: int = 1


# Within what MoA searches: alpha from -n to 8192, beta a multiple of 1/8.
SPANS = [(1024, 0), (8192, 0), (0, 0.125), (2048, 0.125), (-1024, 0.25), (0, 0.5),
         (4096, 0), (0, 1)]  # fmt: skip
# Two thousand tokens of prompt, then documents of several lengths.
PROMPT = 2000
DOCUMENTS = [4000, 1500, 7000, 2500, 9000, 3000, 6000, 12_000, 5000, 8000]


def cases(growth: int) -> tuple[Case, ...]:
    """All mechanisms at ``growth`` times 65,536 positions; ``growth`` is 1 or 16."""
    n, side = N * growth, isqrt(growth)
    return (*_of_text(growth, n), *_of_pictures(side, n), *_of_video(side, n))


def _of_text(growth: int, n: int) -> tuple[Case, ...]:
    """Mechanisms over one sequence."""
    documents = [growth * length for length in DOCUMENTS]
    halves = (64, 40_000 * growth), (40_000 * growth, 60_000 * growth)
    return (
        Case("power_attention", catalog.power_attention(), n),
        Case("s2_attention", catalog.s2_attention(), n, num_heads=32),
        Case("s2_bidirectional", catalog.s2_bidirectional(), n),
        Case("moa", catalog.moa(SPANS), n, num_heads=32),
        Case("a_shape", catalog.a_shape(), n),
        Case("tri_shape", catalog.tri_shape(), n),
        Case("modality_mutual", catalog.modality_mutual(*halves), n),
        Case("pine", catalog.pine(PROMPT * growth, documents), n),
        Case("sparse_transformer_strided", catalog.sparse_transformer_strided(), n, 8),
        Case("sparse_transformer_fixed", catalog.sparse_transformer_fixed(), n, 8),
        Case("longformer", catalog.longformer(), n, num_heads=12),
        Case("longformer dilated", catalog.longformer(dilations=(1, 2, 4)), n, 12),
        Case("big_bird", catalog.big_bird(n // 64), n, num_heads=12),
        Case("log_sparse", catalog.log_sparse(), n),
        Case("prefix_lm", catalog.prefix_lm(4096 * growth), n),
        Case("dilated_window", catalog.dilated_window(), n),
        Case("streaming", catalog.streaming(), n),
        Case("neighborhood 1-D", catalog.neighborhood((n,), 513), n),
    )


def _of_pictures(side: int, n: int) -> tuple[Case, ...]:
    """Mechanisms over a picture whose sides grow by ``side``."""
    square = (256 * side, 256 * side)
    return (
        Case("axial", catalog.axial(h=square[0], w=square[1]), n, num_heads=8),
        Case("neighborhood 2-D", catalog.neighborhood(square), n),
        Case("neighborhood 2-D dilated", catalog.neighborhood(square, 13, 1, 16), n),
        Case(
            "davit_window",
            catalog.davit_window(252 * side, 252 * side),
            (252 * side) ** 2,
        ),
    )


def _of_video(growth: int, n: int) -> tuple[Case, ...]:
    """Mechanisms over a video; its frames grow by ``growth``, their sides by a root."""
    side = isqrt(growth)
    video = (16 * growth, 64 * side, 64 * side)
    # Some text after 24 frames of 45 x 60 cells.
    frames, cells, text = 24 * growth, 45 * 60 * growth, 736 * growth**2
    # A video of 64 frames of 30 x 30 tokens, with the rows and columns of a lattice.
    start, row = 2048 * growth**2, 30 * side
    stop = start + 57_600 * growth**2
    lattice = catalog.mminference_grid((start, stop), row)
    return (
        Case("radial", catalog.radial(16 * growth, 4096 * growth), n),
        Case(
            "radial with text",
            catalog.radial(frames, cells, text_tokens=text),
            frames * cells + text,
        ),
        Case("mminference_grid", lattice, n),
        Case("residue_major", catalog.residue_major(lattice, (start, stop), row, n), n),
        Case("swapped_window", catalog.swapped_window(video, (4, 8, 8)), n),
        Case(
            "swapped_window sliding",
            catalog.swapped_window(video, (5, 9, 9), sliding=True),
            n,
        ),
        Case(
            "neighborhood 3-D",
            catalog.neighborhood(
                video, (5, 16, 16), (1, 8, 8), 1, (True, False, False)
            ),
            n,
        ),
    )


CASES: tuple[Case, ...] = cases(1)
