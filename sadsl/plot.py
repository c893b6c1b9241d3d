"""Pictures of a map and of a plan. Needs matplotlib (the ``viz`` extra)."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

from lowering.facts.plan_counts import Plan
from pallas_kernels.block_mask import expand
from sadsl.analysis.properties import Properties
from sadsl.terms.base import Spec
from sadsl.text.specs import map_of

EMPTY, PARTIAL, FULL = "#f4f4f2", "#f2a65a", "#2e6f95"
# A larger plan is drawn by the strongest kind of each group of blocks.
MOST_CELLS = 1024


def pattern(
    spec: Spec | str,
    q_seq_len: int,
    kv_seq_len: int | None = None,
    *,
    head: int = 0,
    num_heads: int = 1,
    operands: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws every pair of one head: queries downwards, keys to the right."""
    chosen = map_of(spec)
    pairs = chosen.dense(q_seq_len, kv_seq_len, num_heads, operands=operands)[head]
    ax = _axes(ax)
    ax.imshow(pairs, cmap=ListedColormap([EMPTY, FULL]), vmin=0, vmax=1, aspect="equal")
    _label(ax, f"{pairs.mean():.1%} of the pairs", "key", "query", repr(chosen))
    return ax


def weights(
    matrix: Float[np.ndarray, "q_seq kv_seq"],
    *,
    title: str = "weights",
    ax: Axes | None = None,
) -> Axes:
    """Draws a matrix of weights, such as one head of ``sadsl.induced``: log scale.

    Pairs without a weight have the colour of an empty block.
    """
    found = np.asarray(matrix, float)
    ax = _axes(ax)
    shown = np.ma.masked_less_equal(found, 0)
    ax.set_facecolor(EMPTY)
    lowest = float(shown.min()) if shown.count() else 1.0
    norm = LogNorm(vmin=lowest, vmax=max(float(found.max()), lowest * 1.01))
    ax.imshow(shown, cmap="viridis", norm=norm, aspect="equal")
    sums = found.sum(axis=1)
    note = f"{np.mean(found > 0):.1%} of the pairs; rows sum to {_range(sums)}"
    _label(ax, note, "key", "query", title)
    return ax


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def blocks(plan: Plan, *, map_index: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the blocks of one map of a plan: full, partial, empty."""
    kinds = expand(plan.mask)[map_index]
    stride = -(-max(kinds.shape) // MOST_CELLS)
    if stride > 1:
        rows, columns = (-(-n // stride) * stride for n in kinds.shape)
        padded = np.zeros((rows, columns), kinds.dtype)
        padded[: kinds.shape[0], : kinds.shape[1]] = kinds
        grouped = padded.reshape(rows // stride, stride, columns // stride, stride)
        kinds = grouped.max(axis=(1, 3))
    ax = _axes(ax)
    colors = ListedColormap([EMPTY, PARTIAL, FULL])
    ax.imshow(kinds, cmap=colors, vmin=0, vmax=2, aspect="equal")
    counts = [
        (EMPTY, f"empty {plan.num_empty:,}"),
        (PARTIAL, f"partial {plan.num_partial:,}"),
        (FULL, f"full {plan.num_full:,}"),
    ]
    handles = [Patch(facecolor=c, edgecolor="grey", label=t) for c, t in counts]
    ax.legend(handles=handles, loc="upper right", fontsize=8, framealpha=0.95)
    size = f"blocks of {plan.mask.block_q} x {plan.mask.block_kv}"
    _label(ax, size, "key block", "query block", f"{plan.mask.q_seq_len:,} queries")
    return ax


def reach(properties: Properties, *, ax: Axes | None = None) -> Axes:
    """Draws the share of visible pairs that are reached after each depth.

    Where only bounds are known, the band between them.
    """
    points = np.array(properties.reach_by_depth, float).reshape(-1, 3)
    depth, least, most = points.T
    ax = _axes(ax)
    ax.fill_between(depth, least, most, color=PARTIAL, alpha=0.6, linewidth=0)
    ax.plot(depth, most, color=FULL, marker="o", markersize=3)
    ax.plot(depth, least, color=FULL, marker="o", markersize=3)
    ax.set_xscale("log", base=2)
    ax.set_ylim(0, 1.03)
    note = f"hops: {properties.hops_text}"
    _label(ax, note, "depth (layers)", "share of the visible pairs", "reach by depth")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    return plt.subplots(figsize=(4.2, 4.2), layout="constrained")[1]


def _label(ax: Axes, note: str, x: str, y: str, title: str) -> None:
    shown = title if len(title) <= 60 else f"{title[:57]}..."
    ax.set_title(f"{shown}\n{note}", fontsize=9)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_ticks_position("bottom")
