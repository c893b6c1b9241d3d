"""The picture of ``sadsl show --png``. Needs matplotlib (the ``viz`` extra)."""

import textwrap

import matplotlib.pyplot as plt

from sadsl import plot
from sadsl.maps.base import IndexMap
from sadsl.run.plans import plan

# Up to so many positions the picture shows pairs, beyond them blocks, so many a side.
MOST_PAIRS, BLOCKS = 512, 512
MOST_CHARACTERS = 60
INCHES, DOTS_PER_INCH = (4.2, 4.2), 150


def save(
    spec: IndexMap, lengths: tuple[int, int], head: int, num_heads: int, path: str
) -> None:
    """Writes the picture of one head to a file, whose name says the format."""
    plt.switch_backend("Agg")
    block = 1 if max(lengths) <= MOST_PAIRS else -(-max(lengths) // BLOCKS)
    found = plan(
        spec, *lengths, num_heads=num_heads, block_q=block, block_kv=block,
        exact=True, relayout=False,
    )  # fmt: skip
    figure, ax = plt.subplots(figsize=INCHES, layout="constrained")
    if block == 1 and not found.operands:
        plot.pattern(spec, *lengths, head=head, num_heads=num_heads, ax=ax)
    else:
        plot.blocks(found, map_index=int(found.mask.map_of_head[head]), ax=ax)
        text = textwrap.shorten(repr(spec), MOST_CHARACTERS, placeholder=" ...")
        figure.suptitle(text, fontsize=9)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    finally:
        plt.close(figure)
