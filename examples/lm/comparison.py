"""Stores, averages, tabulates and draws runs of several specs and seeds."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtrit

from lm.checkpoints import History
from lm.files import replace_file

CONFIDENCE = 0.95
START, END = "<!-- compare:start -->", "<!-- compare:end -->"
COLOURS = (
    "#4c566a", "#d1495b", "#2a7f9e", "#e0a030", "#6a994e", "#8f5ea8", "#c06c3e",
    "#3f7d6e", "#b04f8a", "#7a8f2e", "#5b6bbf",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run of one spec with one seed."""

    history: History
    num_params: int
    temp_bytes: int

    @property
    def bits(self) -> float:
        """Bits per byte of the validation part after the last step."""
        return self.history.valid[-1][1]


class Estimate(NamedTuple):
    """A mean, and half the width of its confidence interval (NaN of one value)."""

    mean: float
    half: float

    def text(self, sign: str = "") -> str:
        """``2.903 ± 0.012``."""
        half = "" if math.isnan(self.half) else f" ± {self.half:.3f}"
        return f"{self.mean:{sign}.3f}{half}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``against`` is the mean difference to the first spec, seed by seed: both saw the
    same batches. ``None`` in the first line.
    """

    name: str
    spec: str
    note: str
    bits: Estimate
    against: Estimate | None
    step_ms: float
    temp_mib: float
    num_params: int
    d_hidden: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and Student's t-interval: values are independent and about normal."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, math.nan)
    quantile = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
    return Estimate(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(count))


def against(runs: Sequence[Run], base: Sequence[Run]) -> Estimate:
    """The difference in bits to the runs of another spec with the same seeds."""
    pairs = zip(runs, base, strict=True)
    return estimate([run.bits - other.bits for run, other in pairs])


class Kept:
    """A folder of finished runs: one JSON file each, complete or not there.

    ``identity`` holds, under short names, everything that the numbers in a file depend
    on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Reads what was written under a name; None if nothing was.

        Raises:
          ValueError: it is damaged, or of another run.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            there, found = dict(record["identity"]), dict(record["found"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}): delete it to make it again, or pass "
                "--fresh to start over"
            ) from error
        mine = _texts(identity)
        if there != mine:
            differing = [
                f"  {key}: {there.get(key)} there, {mine.get(key)} here"
                for key in sorted({*there, *mine})
                if there.get(key) != mine.get(key)
            ]
            raise ValueError(
                f"{path} is of another run:\n" + "\n".join(differing) + "\nsay the "
                "same to go on with it, name another --out, or pass --fresh to start "
                "over"
            )
        return found

    def write(
        self, name: str, identity: Mapping[str, Any], found: Mapping[str, Any]
    ) -> None:
        """Writes a record under a name."""
        record = {"identity": _texts(identity), "found": found}
        replace_file(
            self.folder / f"{name}.json",
            lambda path: path.write_text(json.dumps(record)),
        )

    def forget(self) -> None:
        """Deletes all records."""
        for path in self.folder.glob("*.json"):
            path.unlink()


def _texts(identity: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in identity.items()}


def run_record(run: Run) -> dict[str, Any]:
    """A run as JSON holds it."""
    return asdict(run)


def run_of(record: Mapping[str, Any]) -> Run:
    """The run of ``run_record``."""
    return Run(**{**record, "history": History(**record["history"])})


def check_equal_params(rows: Mapping[str, int], tolerance: float = 0.01) -> None:
    """Checks that all models have about the same number of parameters.

    Raises:
      ValueError: some number of parameters is over ``tolerance`` off the first.
    """
    base = next(iter(rows.values()))
    for name, count in rows.items():
        if abs(count - base) > tolerance * base:
            raise ValueError(
                f"{name} has {count:,} parameters and {next(iter(rows))} {base:,}, "
                f"over {tolerance:.0%} apart: models of one size are compared, so "
                "change the width of its MLP"
            )


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, the head first."""
    head = ["", "bits/byte", f"against {rows[0].name}", "step, ms", "memory, MiB"]
    return [head] + [
        [
            row.name, row.bits.text(),
            "" if row.against is None else row.against.text("+"),
            f"{row.step_ms:,.0f}", f"{row.temp_mib:,.0f}",
        ]
        for row in rows
    ]  # fmt: skip


def text_table(rows: Sequence[Row]) -> str:
    """For a terminal or a text file."""
    lines = cells(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "  ".join([
            line[0].ljust(widths[0]),
            *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)),
        ]).rstrip()
        for line in lines
    ]  # fmt: skip
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([shown[0], rule, *shown[1:]])


def markdown(rows: Sequence[Row], said: str) -> str:
    """For a document: the table, the specs, and how it was measured."""
    head, *lines = cells(rows)
    out = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    out += ["| " + " | ".join(line) + " |" for line in lines]
    listed = [
        f"- {row.name}: `{row.spec}`{row.note and '; ' + row.note}" for row in rows
    ]
    fill = partial(
        textwrap.fill, width=88, break_long_words=False, break_on_hyphens=False
    )
    specs = [fill(line, subsequent_indent="  ") for line in listed]
    return "\n".join([*out, "", fill(said), "", *specs])


def insert(path: Path, text: str) -> None:
    """Puts a text between the markers of a document.

    Raises:
      ValueError: they are not there, once each and in order.
    """
    document = path.read_text()
    start, end = document.find(START), document.find(END)
    once = document.count(START) == document.count(END) == 1
    if not (once and start < end):
        raise ValueError(
            f"{path} must have one line {START!r} and after it one {END!r}: the table "
            "goes between them"
        )
    whole = f"{document[: start + len(START)]}\n\n{text}\n\n{document[end:]}"
    replace_file(path, lambda part: part.write_text(whole))


def draw(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]]) -> Figure:
    """Training losses by step with their spread, and what a step costs against bits."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    curves, costs = figure.subplots(1, 2)
    for index, row in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        losses = np.array([run.history.train for run in runs[row.name]])
        width = max(1, losses.shape[1] // 20)
        kernel = np.full(width, 1 / width)
        smooth = np.stack([np.convolve(x, kernel, mode="valid") for x in losses])
        steps = np.arange(width, losses.shape[1] + 1)
        curves.plot(steps, smooth.mean(axis=0), color=colour, label=row.name)
        low, high = smooth.min(axis=0), smooth.max(axis=0)
        curves.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        half = 0.0 if math.isnan(row.bits.half) else row.bits.half
        costs.errorbar(
            row.step_ms, row.bits.mean, yerr=half, color=colour, marker="o", capsize=3
        )
        costs.annotate(
            row.name, (row.step_ms, row.bits.mean), textcoords="offset points",
            xytext=(6, 4), fontsize=8, color=colour,
        )  # fmt: skip
    costs.margins(x=0.2)  # for the names
    _label(curves, "step", f"bits per byte in training, mean of {width} steps")
    _label(costs, "median step, ms", "bits per byte of the validation part")
    curves.legend(frameon=False, fontsize=8)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
