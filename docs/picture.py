"""Draws the picture of README and of the first page: a map, and a plan of blocks.

python docs/picture.py
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

import sadsl as sa
from sadsl import plot

FILE = Path(__file__).parent / "_static" / "pattern.png"


def main() -> None:
    """Writes the file; the same bytes each time."""
    spec = sa.causal() & (sa.window(3) | sa.sinks(2))
    large = sa.causal() & (sa.window(512) | sa.sinks(64))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.9), layout="constrained")
    plot.pattern(spec, 24, ax=left)
    plot.blocks(sa.plan(large, 4096, block_q=64, block_kv=64), ax=right)
    counts = right.get_title().splitlines()[1]
    right.set_title(f"the plan of {large}\n4,096 positions, {counts}", fontsize=9)
    figure.savefig(
        FILE, dpi=110, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None}
    )


if __name__ == "__main__":
    main()
