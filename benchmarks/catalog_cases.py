"""Every mechanism of the catalogue as it was published, at about 65,536 positions.

Where there is no published default (where a modality begins, how long documents are,
which spans a search found), the value is chosen here and a comment says so.
"""

from typing import NamedTuple

from sadsl import IndexMap, catalog

N = 65_536
# A video of 16 frames of 64 x 64 cells, and one of 24 frames of 45 x 60 and some text.
VIDEO = (16, 64, 64)
FRAMES, CELLS, TEXT = 24, 45 * 60, 736


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
DOCUMENTS = [4000, 1500, 7000, 2500, 9000, 3000, 6000, 12_000, 5000, 8000]

CASES: tuple[Case, ...] = (
    Case("power_attention", catalog.power_attention()),
    Case("s2_attention", catalog.s2_attention(), num_heads=32),
    Case("s2_bidirectional", catalog.s2_bidirectional()),
    Case("radial", catalog.radial(16, 4096)),
    Case(
        "radial with text",
        catalog.radial(FRAMES, CELLS, text_tokens=TEXT),
        FRAMES * CELLS + TEXT,
    ),
    Case("moa", catalog.moa(SPANS), num_heads=32),
    Case("a_shape", catalog.a_shape()),
    Case("tri_shape", catalog.tri_shape()),
    # A video of 64 frames of 900 tokens, with the rows and columns of a lattice.
    Case("mminference_grid", catalog.mminference_grid((2048, 2048 + 57_600), 30)),
    Case(
        "residue_major",
        catalog.residue_major(
            catalog.mminference_grid((2048, 2048 + 57_600), 30), (2048, 59_648), 30, N
        ),
    ),
    Case("modality_mutual", catalog.modality_mutual((64, 40_000), (40_000, 60_000))),
    Case("pine", catalog.pine(2000, DOCUMENTS)),
    Case("swapped_window", catalog.swapped_window(VIDEO, (4, 8, 8))),
    Case(
        "swapped_window sliding", catalog.swapped_window(VIDEO, (5, 9, 9), sliding=True)
    ),
    Case(
        "sparse_transformer_strided", catalog.sparse_transformer_strided(), num_heads=8
    ),
    Case("sparse_transformer_fixed", catalog.sparse_transformer_fixed(), num_heads=8),
    Case("longformer", catalog.longformer(), num_heads=12),
    Case("longformer dilated", catalog.longformer(dilations=(1, 2, 4)), num_heads=12),
    Case("big_bird", catalog.big_bird(N // 64), num_heads=12),
    Case("log_sparse", catalog.log_sparse()),
    Case("axial", catalog.axial(h=256, w=256), num_heads=8),
    Case("prefix_lm", catalog.prefix_lm(4096)),
    Case("dilated_window", catalog.dilated_window()),
    Case("streaming", catalog.streaming()),
    Case("neighborhood 1-D", catalog.neighborhood((N,), 513)),
    Case("neighborhood 2-D", catalog.neighborhood((256, 256))),
    Case("neighborhood 2-D dilated", catalog.neighborhood((256, 256), 13, 1, 16)),
    Case(
        "neighborhood 3-D",
        catalog.neighborhood(VIDEO, (5, 16, 16), (1, 8, 8), 1, (True, False, False)),
    ),
    Case("davit_window", catalog.davit_window(252, 252), 252 * 252),
)
