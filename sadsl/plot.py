"""Pictures of maps, plans, weights and reach. Needs matplotlib (the ``viz`` extra)."""

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
from sadsl.sharding.plan import ShardPlan
from sadsl.terms.base import Spec
from sadsl.text.specs import map_of

EMPTY, PARTIAL, FULL = "#f4f4f2", "#f2a65a", "#2e6f95"
# Most cells along a side of a picture of blocks; see `blocks`.
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
    """Draws which pairs one head selects: queries downwards, keys to the right.

    Args:
      spec: an index map, a term, or text.
      q_seq_len, kv_seq_len: queries, and keys (as many if None); for small sizes.
      head: which head of ``num_heads``.
      num_heads: heads of the map.
      operands: the run-time arrays that the map reads, without a batch axis.
      ax: where to draw; a new figure if None.

    Returns:
      The axes; ``.figure`` is the figure.

    Raises:
      ValueError: as ``dense`` of the map.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> plt.switch_backend("Agg")  # no display
      >>> import sadsl.plot
      >>> ax = sadsl.plot.pattern("causal() & window(2)", 8)
      >>> ax.get_title().splitlines()
      ['causal() & window(2)', '32.8% of the pairs']
      >>> plt.close(ax.figure)
    """
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
    """Draws a matrix of weights in a logarithmic scale.

    Such a matrix is one head of ``sadsl.induced``.

    Pairs without a weight have the colour of an empty block.

    Args:
      matrix: weights of one head.
      title: first line above the picture.
      ax: where to draw; a new figure if None.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> plt.switch_backend("Agg")  # no display
      >>> import numpy as np
      >>> import sadsl.plot
      >>> ax = sadsl.plot.weights(np.eye(4), title="identity")
      >>> ax.get_title().splitlines()
      ['identity', '25.0% of the pairs; rows sum to 1']
      >>> plt.close(ax.figure)
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


def traffic(plan: ShardPlan, *, part: int = 0, ax: Axes | None = None) -> Axes:
    """Draws which device sends keys to which, for one part of a plan of shards.

    A cell is the number of keys that the device of its row gets of that of its column.
    Own keys are grey. In a ring and in an all-to-all every device sends to every other.

    Args:
      plan: of ``sadsl.shard_plan``.
      part: which of its parts.
      ax: where to draw; a new figure if None.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> plt.switch_backend("Agg")  # no display
      >>> import sadsl as sa, sadsl.plot
      >>> plan = sa.shard_plan(sa.causal() & sa.window(100), 4096, 8)
      >>> ax = sadsl.plot.traffic(plan)
      >>> ax.get_title().splitlines()[1]
      'halo of 128 keys before and 0 after'
      >>> plt.close(ax.figure)
    """
    found = plan.parts[part]
    count = plan.shards.count
    if found.route is None or found.route.way != "parts":
        keys = np.full((count, count), plan.shards.kv_size)
        np.fill_diagonal(keys, 0)
    else:
        keys = found.route.parts.traffic
    ax = _axes(ax)
    ax.set_facecolor(EMPTY)
    shown = np.ma.masked_equal(keys, 0)
    norm = LogNorm(vmin=1, vmax=max(2, plan.shards.kv_size))
    ax.imshow(shown, cmap="YlGnBu", norm=norm, aspect="equal")
    ax.imshow(
        np.ma.masked_equal(np.eye(count), 0), cmap=ListedColormap(["#bdbdb8"]),
        aspect="equal",
    )  # fmt: skip
    _label(ax, found.how, "sender", "receiver", repr(found.spec))
    return ax


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def blocks(plan: Plan, *, map_index: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the blocks of one map of a plan: full, partial and empty.

    A plan of more than ``MOST_CELLS`` blocks a side is drawn coarser: each cell shows
    the strongest kind of its blocks.

    Args:
      plan: what ``sadsl.plan`` returns.
      map_index: which of the plan's distinct maps.
      ax: where to draw; a new figure if None.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> plt.switch_backend("Agg")  # no display
      >>> import sadsl as sa
      >>> import sadsl.plot
      >>> plan = sa.plan(sa.causal(), 512, 512, block_q=128, block_kv=128)
      >>> ax = sadsl.plot.blocks(plan)
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['empty 6', 'partial 4', 'full 6']
      >>> plt.close(ax.figure)
    """
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
    """Draws what share of the visible pairs is connected after each number of layers.

    Where only bounds are known, the picture shows the band between them.

    Args:
      properties: what ``sadsl.properties`` returns.
      ax: where to draw; a new figure if None.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> plt.switch_backend("Agg")  # no display
      >>> import sadsl as sa
      >>> import sadsl.plot
      >>> ax = sadsl.plot.reach(sa.properties(sa.causal() & sa.window(4), 32))
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('depth (layers)', 'share of the visible pairs')
      >>> plt.close(ax.figure)
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
