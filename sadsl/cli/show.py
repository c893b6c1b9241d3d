"""``sadsl show``: the pairs or blocks of a map as a picture of characters."""

import importlib
import importlib.util

import numpy as np
from absl import flags

from lowering.facts.plan_counts import Plan
from pallas_kernels.block_mask import PARTIAL, expand
from sadsl.cli.call import kv_seq_len
from sadsl.cli.command import CommandResult
from sadsl.cli.progress import progress
from sadsl.maps.base import IndexMap
from sadsl.run.plans import plan
from sadsl.terms.base import Spec
from sadsl.text.specs import map_of

# Characters of an empty, a partial and a full block.
CHARACTERS = ".+#"
# A map of more positions than this is drawn in cells, at most as many as that.
MOST_POSITIONS, MOST_CELLS = 40, 32
# A position is written at each so-manieth row and column.
STEP = 4


def show(asked: flags.FlagValues, spec: Spec) -> CommandResult:
    """Draws a map in the terminal, and in a file if one is named.

    Raises:
      ValueError: no such head, or a file is named and matplotlib is not installed.
    """
    if asked.head >= asked.heads:
        raise ValueError(
            f"--head={asked.head}: must be below --heads, which is {asked.heads}"
        )
    longest = max(asked.seq_len, kv_seq_len(asked))
    block = 1 if longest <= MOST_POSITIONS else -(-longest // MOST_CELLS)
    with progress("planning"):
        found = plan(
            map_of(spec), asked.seq_len, kv_seq_len(asked), num_heads=asked.heads,
            block_q=block, block_kv=block, exact=True, relayout=False,
        )  # fmt: skip
    kinds = expand(found.mask)[int(found.mask.map_of_head[asked.head])]
    rows: list[str] = ["".join(CHARACTERS[kind] for kind in row) for row in kinds]
    values = {
        "spec": repr(spec),
        "q_seq_len": asked.seq_len,
        "kv_seq_len": kv_seq_len(asked),
        "head": asked.head,
        "heads": asked.heads,
        "cell": block,
        "rows": rows,
        "png": asked.png,
    }
    lines = [repr(spec), *_legend(found, kinds, block), "", *_picture(rows, block)]
    if asked.png:
        _save_png(asked, map_of(spec))
        lines += ["", f"written to {asked.png}"]
    return CommandResult("\n".join(lines), values)


def _legend(found: Plan, kinds: np.ndarray, block: int) -> tuple[str, str]:
    """The sizes, and what the characters mean."""
    q, kv = found.mask.q_seq_len, found.mask.kv_seq_len
    sizes = f"{q:,} queries (down) x {kv:,} keys (across)"
    names = ", ".join(name.removesuffix(".chosen") for name in found.operands)
    waiting = f"decided at run time by {names}"
    if block == 1:
        partial = f"+ {waiting}, " if (kinds == PARTIAL).any() else ""
        return sizes, f"# sees, {partial}. does not see"
    partial = f"some, or {waiting}" if found.operands else "some"
    cells = f", cells of {block:,} x {block:,}"
    return sizes + cells, f"# all pairs, + {partial}, . none"


def _picture(rows: list[str], block: int) -> list[str]:
    """The rows with the positions of queries on the left and of keys above."""
    # A space between characters makes cells about square.
    spread = [" ".join(row) for row in rows]
    starts = [f"{i * block:,}" if i % STEP == 0 else "" for i in range(len(rows))]
    width = max(map(len, starts))
    above = range(0, len(rows[0]), STEP)
    keys = "".join(f"{i * block:<{2 * STEP},}" for i in above).rstrip()
    body = [f"{s:>{width}} {row}" for s, row in zip(starts, spread, strict=True)]
    return [f"{'':>{width}} {keys}", *body]


def _save_png(asked: flags.FlagValues, spec: IndexMap) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--png={asked.png}: pictures need matplotlib, which is not installed: "
            "pip install matplotlib"
        )
    # Matplotlib is an extra, so only this flag loads the module that imports it.
    png = importlib.import_module("sadsl.cli.png")
    lengths = asked.seq_len, kv_seq_len(asked)
    png.save(spec, lengths, asked.head, asked.heads, asked.png)
