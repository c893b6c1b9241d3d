"""Reports runs side by side: a table, JSON, Markdown, and three pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

import sadsl as sa
from lm.files import replace_file
from lm.model import ROUTING, ModelConfig
from lm.training import Result, TrainConfig

BLOCK = 128
# The most positions that a picture shows, and the most cells.
PICTURE_POSITIONS, PICTURE_CELLS = 1024, 256
COLOURS = ("#4c566a", "#d1495b", "#2a7f9e", "#e0a030", "#6a994e", "#8f5ea8")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    spec: str
    valid_bits: float
    train_bits: float
    step_seconds: float
    tokens_per_second: float
    memory_bytes: int
    # None if content decides the pairs.
    num_pairs: int | None = None
    visited_blocks: int | None = None
    num_blocks: int | None = None


def row(result: Result, model: ModelConfig, config: TrainConfig) -> Row:
    """The numbers of one run; pairs and blocks are of one layer and one head map."""
    history = result.history
    # The first step of a process includes warming up.
    seconds = float(np.median(history.seconds[1:] or history.seconds))
    counts = {}
    if not by_content(result.spec):
        plan = sa.plan(
            result.spec, config.seq_len,
            block_q=BLOCK, block_kv=BLOCK, num_heads=model.num_heads,
        )  # fmt: skip
        counts = {
            "num_pairs": plan.num_pairs,
            "visited_blocks": plan.num_full + plan.num_partial,
            "num_blocks": plan.num_blocks,
        }
    return Row(
        spec=result.spec,
        valid_bits=history.valid[-1][1],
        train_bits=float(np.mean(history.train[-20:])),
        step_seconds=seconds,
        tokens_per_second=config.tokens_per_step / seconds,
        memory_bytes=result.memory_bytes,
        **counts,
    )


def by_content(spec: str) -> bool:
    """Whether the attended pairs depend on the text, as in routing and selections."""
    return spec == ROUTING or bool(sa.plan(spec, 1, relayout=False).operands)


def _cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The table as text; the other runs are compared with the first."""
    base = rows[0]
    return [
        {
            "spec": row.spec,
            "validation bits/byte": f"{row.valid_bits:.3f}",
            "median step, ms": f"{1e3 * row.step_seconds:,.0f}",
            "tokens/s": f"{row.tokens_per_second:,.0f}",
            "speed": f"{base.step_seconds / row.step_seconds:.2f}x",
            **_counts(row, base),
            "step memory, MiB": f"{row.memory_bytes / 2**20:,.0f}",
        }
        for row in rows
    ]


def _counts(row: Row, base: Row) -> dict[str, str]:
    names = "attention pairs", "of those of the first", "visited blocks"
    if row.num_pairs is None or base.num_pairs is None:
        return dict.fromkeys(names, "by content")
    visited = f"{row.visited_blocks:,} of {row.num_blocks:,}"
    share = f"{row.num_pairs / base.num_pairs:.1%}"
    return dict(zip(names, (f"{row.num_pairs:,}", share, visited), strict=True))


def table(rows: Sequence[Row]) -> Table:
    """The comparison for a terminal: one column for each run."""
    cells = _cells(rows)
    shown = Table(title="dense and sparse, all else equal", title_justify="left")
    shown.add_column("spec")
    for line in cells:
        shown.add_column(line["spec"], justify="right", overflow="fold")
    for name in list(cells[0])[1:]:
        shown.add_row(name, *(line[name] for line in cells))
    return shown


def markdown(rows: Sequence[Row], setting: str) -> str:
    """The comparison, for a document."""
    cells = _cells(rows)
    for line in cells:
        line["spec"] = f"`{line['spec'].replace('|', chr(92) + '|')}`"
    widths = {name: max(len(name), *(len(x[name]) for x in cells)) for name in cells[0]}
    lines = [
        "| " + " | ".join(f"{name:<{width}}" for name, width in widths.items()) + " |",
        "|" + "|".join(
            "-" * (w + 2) if name == "spec" else "-" * (w + 1) + ":"
            for name, w in widths.items()
        ) + "|",
    ]  # fmt: skip
    for line in cells:
        padded = (
            f"{line[name]:<{w}}" if name == "spec" else f"{line[name]:>{w}}"
            for name, w in widths.items()
        )
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join([*lines, "", setting, ""])


def write(
    out: Path,
    results: Sequence[Result],
    rows: Sequence[Row],
    setting: dict[str, Any],
    config: TrainConfig,
) -> list[Path]:
    """Writes table and pictures, each whole or not at all, and returns the paths."""
    record = {
        "setting": setting,
        "rows": [asdict(row) for row in rows],
        "runs": [asdict(result) for result in results],
    }
    said = ", ".join(f"{name} {value}" for name, value in setting.items())
    text = markdown(rows, f"Measured with {said}.")
    specs = [result.spec for result in results]
    curves, patterns = draw_curves(results), draw_patterns(specs, setting)
    steps = draw_steps(results, config)
    writers: dict[str, Callable[[Path], object]] = {
        "train_lm.json": lambda p: p.write_text(json.dumps(record, indent=1)),
        "train_lm.md": lambda p: p.write_text(text),
        "loss.png": lambda p: curves.savefig(p, dpi=150, format="png"),
        "steps.png": lambda p: steps.savefig(p, dpi=150, format="png"),
        "pattern.png": lambda p: patterns.savefig(p, dpi=150, format="png"),
    }
    for name, writer in writers.items():
        replace_file(out / name, writer)
    return [out / name for name in writers]


def draw_curves(results: Sequence[Result]) -> Figure:
    """Draws bits per byte by step, and by the time that the steps took."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    width = max(1, results[0].history.step // 25)
    for index, result in enumerate(results):
        history, colour = result.history, COLOURS[index % len(COLOURS)]
        mean = np.convolve(history.train, np.full(width, 1 / width), mode="valid")
        at = np.array([int(step) for step, _ in history.valid])
        bits = [bits for _, bits in history.valid]
        steps, seconds = np.arange(1, history.step + 1), np.cumsum(history.seconds)
        for axes, x in ((by_step, steps), (by_time, seconds)):
            axes.plot(x[width - 1 :], mean, color=colour, alpha=0.4, linewidth=1)
            axes.plot(
                x[at - 1], bits, color=colour, linewidth=2,
                marker="o", markersize=4, label=result.spec,
            )  # fmt: skip
    _label(by_step, "step", "bits per byte")
    _label(by_time, "seconds spent in steps", "")
    said = f"dots: validation, thin: training, mean of {width} steps"
    _legend(figure, by_step, said)
    return figure


def draw_steps(results: Sequence[Result], config: TrainConfig) -> Figure:
    """Draws the norm of the gradient and the learning rate by step."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    norms, rates = figure.subplots(1, 2)
    steps = np.arange(1, config.steps + 1)
    for index, result in enumerate(results):
        colour = COLOURS[index % len(COLOURS)]
        norms.plot(
            steps, result.history.grad_norm, color=colour, alpha=0.8, linewidth=1,
            label=result.spec,
        )  # fmt: skip
    said = None
    if np.isfinite(config.clip_norm):
        norms.axhline(config.clip_norm, color="black", linestyle=":", linewidth=1)
        said = f"dotted: larger gradients are scaled down to {config.clip_norm:g}"
    norms.set_yscale("log")
    norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norms.yaxis.set_major_formatter("{x:g}")
    norms.yaxis.set_minor_formatter(NullFormatter())
    rates.plot(steps, config.rates(), color="black", linewidth=1.5)
    rates.set_ylim(bottom=0)
    _label(norms, "step", "norm of the gradient")
    _label(rates, "step", "learning rate")
    _legend(figure, norms, said)
    return figure


def _legend(figure: Figure, axes: Axes, title: str | None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center",
        ncols=1 if len(labels) > 2 else len(labels), frameon=False, fontsize=9,
        title=title, title_fontsize=9,
    )  # fmt: skip


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_patterns(specs: Sequence[str], setting: dict[str, Any]) -> Figure:
    """Draws the first positions of each static spec, darker where more is seen."""
    specs = [text for text in specs if not by_content(text)]
    size = min(setting["seq_len"], PICTURE_POSITIONS)
    cell = -(-size // PICTURE_CELLS)
    columns = min(len(specs), 3)
    lines = -(-len(specs) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(specs) :]:
        axes.set_axis_off()
    for axes, text in zip(grid.flat, specs, strict=False):
        spec = sa.parse(text)
        found = spec.map if isinstance(spec, sa.Softmax) else spec
        share = found.dense(size, num_heads=setting["num_heads"]).mean(axis=0)
        axes.imshow(
            _shrink(share, cell), cmap="Greys", vmin=0, vmax=1.25,
            extent=(0, size, size, 0), interpolation="nearest",
        )  # fmt: skip
        axes.set_title(text, fontsize=9, wrap=True)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    return figure


def _shrink(image: np.ndarray, cell: int) -> np.ndarray:
    """Means over squares of ``cell`` positions; the last ones may be cut off."""
    size = len(image) // cell
    image = image[: size * cell, : size * cell]
    return image.reshape(size, cell, size, cell).mean(axis=(1, 3))
