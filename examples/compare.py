"""Compares kinds of attention in language models of one size, on the same batches.

    python examples/compare.py                          # some ten minutes
    python examples/compare.py --only=dense --only=window --seeds=5
    python examples/compare.py --docs                   # and writes the table of docs

Each kind trains a byte-level model once for each seed, on the sources of Python's
standard library or on ``--data``. For one seed, all kinds see the same batches. All
models have the same number of parameters: where a kind learns more of its own, its MLP
is narrower. Before training, an untrained model of each kind is tested for bytes that
see the future. Finished runs are kept: the same command goes on where it was stopped.
It writes a table (text, JSON, Markdown) and a picture to ``--out``.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from lm import comparison, data, foresight
from lm.cases import DEFAULT, NAMES, QUICK, Entry, Preset, entries
from lm.checkpoints import History
from lm.comparison import Kept, Row, Run
from lm.model import count_params
from lm.training import (
    Compiled,
    compile_run,
    first_state,
    identity,
    train,
)
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
# Each step of a round runs twice, and the second run is timed.
TIMED_ROUNDS = 15
AHEAD = "members of a cluster depend on later bytes, as published"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    only: tuple[str, ...] | None
    data: str | None
    out: Path
    seeds: int | None
    steps: int | None
    fresh: bool
    docs: bool
    quick: bool


def options(arguments: Sequence[str]) -> Options:
    """Reads the command line; exits with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", action="append", choices=NAMES, help="a kind; all if never given")
    add("--data", help="a file or a folder; Python's sources if not given")
    add("--out", type=Path, default=Path("out/compare"), help="where results go")
    add("--seeds", type=int, help=f"runs of each kind ({DEFAULT.seeds})")
    add("--steps", type=int, help=f"steps of a run ({DEFAULT.train.steps})")
    add("--fresh", action="store_true", help="forget finished runs")
    add("--docs", action="store_true", help="put the table into docs/benchmarks.md")
    add("--quick", action="store_true", help="two kinds, two seeds, four tiny steps")
    given = vars(parser.parse_args(arguments))
    only = given.pop("only")
    return Options(only=None if only is None else tuple(only), **given)


def preset(asked: Options) -> Preset:
    """The sizes that the options ask for.

    Raises:
      ValueError: there is no seed, or no step.
    """
    chosen = QUICK if asked.quick else DEFAULT
    seeds = chosen.seeds if asked.seeds is None else asked.seeds
    if seeds < 1:
        raise ValueError(f"--seeds={seeds} must be at least 1")
    config = chosen.train
    if asked.steps is not None:
        config = replace(config, steps=asked.steps, warmup_steps=asked.steps // 10)
    return replace(chosen, train=config, seeds=seeds)


class Runs:
    """Finished runs on disk, and the programs that make the missing ones."""

    def __init__(self, sizes: Preset, corpus: data.Corpus, folder: Path) -> None:
        self.sizes, self.corpus = sizes, corpus
        self.kept = Kept(folder)
        self.compiled: dict[str, Compiled] = {}

    def identity(self, entry: Entry, seed: int) -> dict[str, Any]:
        """Everything that the losses of a run depend on."""
        config = replace(self.sizes.train, seed=seed)
        return identity(entry.spec, entry.model, config, self.corpus)

    def find(self, entry: Entry, seed: int) -> Run | None:
        """A finished run."""
        record = self.kept.read(f"{entry.file}-{seed}", self.identity(entry, seed))
        return None if record is None else comparison.run_of(record)

    def program(self, entry: Entry) -> Compiled:
        """The compiled steps of a kind, used for all seeds."""
        if entry.name not in self.compiled:
            compiled = compile_run(entry.spec, entry.model, self.sizes.train)
            self.compiled[entry.name] = compiled
        return self.compiled[entry.name]

    def train(self, entry: Entry, seed: int, progress: Progress) -> Run:
        """One run from start to end; kept when it is finished."""
        config = replace(self.sizes.train, seed=seed)
        title = f"{entry.name}, seed {seed}"
        task = progress.add_task(title, total=config.steps, now="compiling")
        compiled = self.program(entry)
        _, state = first_state(entry.spec, entry.model, config)
        history = History()

        def tell(history: History) -> None:
            now = f"{history.train[-1]:.3f} bits/byte"
            progress.update(task, completed=history.step, now=now)

        train(
            compiled, state, history, config, self.corpus,
            keep=lambda state, history: None, tell=tell,
        )  # fmt: skip
        run = Run(history, compiled.num_params, compiled.temp_bytes)
        record = comparison.run_record(run)
        self.kept.write(f"{entry.file}-{seed}", self.identity(entry, seed), record)
        progress.remove_task(task)
        quiet = 1e3 * statistics.median(history.seconds)
        progress.console.print(
            f"  {title}: {run.bits:.3f} bits/byte, {quiet:,.0f} ms a step",
            highlight=False,
        )
        return run

    def step_times(self, chosen: Sequence[Entry]) -> dict[str, float]:
        """Median milliseconds of a training step, by name; measured alternately."""
        label = "times-" + "-".join(entry.file for entry in chosen)
        said = {entry.name: self.identity(entry, 0) for entry in chosen}
        record = self.kept.read(label, said)
        if record is None:
            record = self._measure(chosen)
            self.kept.write(label, said, record)
        return record

    def _measure(self, chosen: Sequence[Entry]) -> dict[str, float]:
        config = self.sizes.train
        batch = data.train_batch(
            self.corpus, seed=0, step=0,
            batch_size=config.batch_size, seq_len=config.seq_len,
        )  # fmt: skip
        states = {x.name: first_state(x.spec, x.model, config)[1] for x in chosen}
        seconds: dict[str, list[float]] = {entry.name: [] for entry in chosen}

        def step(entry: Entry) -> float:
            begin = time.perf_counter()
            states[entry.name], bits = self.program(entry).step(
                states[entry.name], batch
            )
            bits.block_until_ready()
            return time.perf_counter() - begin

        for entry in chosen:  # compiles
            step(entry)
        for _ in range(TIMED_ROUNDS):
            for entry in chosen:
                step(entry)  # fills the caches with the arrays of this step
                seconds[entry.name].append(step(entry))
        return {name: 1e3 * statistics.median(x) for name, x in seconds.items()}


def check_foresight(entry: Entry, sizes: Preset, console: Console) -> None:
    """Tests that no model predicts a byte from itself, and prints the result."""
    small = replace(entry.model, num_layers=1)
    found = foresight.foresight(entry.spec, small, sizes.train.seq_len)
    foresight.refuse(
        entry.name, entry.spec, found, chooses_ahead=entry.case.chooses_ahead
    )
    ahead = found.choices > foresight.TOLERANCE
    params = count_params(entry.model, entry.spec)
    console.print(
        f"  {entry.name}: {params:,} parameters, MLP of {entry.model.d_hidden}, "
        f"{'chooses by later bytes, as published' if ahead else 'sees no later byte'}",
        highlight=False,
    )


def rows_of(
    chosen: Sequence[Entry], runs: Mapping[str, Sequence[Run]], ms: Mapping[str, float]
) -> list[Row]:
    """The rows of the table; the others are compared with the first kind."""
    base = chosen[0].name
    return [
        Row(
            name=entry.name,
            spec=entry.code,
            note=AHEAD if entry.case.chooses_ahead else "",
            bits=comparison.estimate([run.bits for run in runs[entry.name]]),
            against=None if entry.name == base
            else comparison.against(runs[entry.name], runs[base]),
            step_ms=ms[entry.name],
            temp_mib=runs[entry.name][0].temp_bytes / 2**20,
            num_params=runs[entry.name][0].num_params,
            d_hidden=entry.model.d_hidden,
        )
        for entry in chosen
    ]  # fmt: skip


def description(sizes: Preset, rows: Sequence[Row]) -> str:
    """How it was measured, in a sentence or two."""
    model, config = sizes.model, sizes.train
    seeds = "one seed" if sizes.seeds == 1 else f"{sizes.seeds} seeds"
    interval = "" if sizes.seeds == 1 else (
        f", ± half of the {comparison.CONFIDENCE:.0%} t-interval; differences are "
        "taken seed by seed, on the same batches"
    )  # fmt: skip
    most = max(row.num_params for row in rows)
    return (
        f"Mean over {seeds}{interval}. {most:,} parameters at most, equal within 1%; "
        f"{model.num_layers} layers, "
        f"{model.num_heads} heads of {model.d_model // model.num_heads}; "
        f"{config.steps} steps of {config.tokens_per_step:,} bytes, "
        f"{config.seq_len:,} of context; validation on "
        f"{config.valid_batches * config.tokens_per_step:,} bytes of other files. "
        "Median time of steps that alternate, and temporary memory of the compiled "
        f"step, on {jax.devices()[0].device_kind} x{os.cpu_count()}, "
        f"jax {jax.__version__}."
    )


def write(
    out: Path, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], said: str
) -> str:
    """Writes the table in three forms, and the picture; returns it as Markdown."""
    text = f"{comparison.text_table(rows)}\n\n{said}\n"
    marked = comparison.markdown(rows, said)
    record = {"setting": said, "rows": [asdict(row) for row in rows]}
    figure = comparison.draw(rows, runs)
    writers = {
        "compare.txt": lambda path: path.write_text(text),
        "compare.md": lambda path: path.write_text(marked + "\n"),
        "compare.json": lambda path: path.write_text(json.dumps(record, indent=1)),
        "compare.png": lambda path: figure.savefig(path, dpi=150, format="png"),
    }
    for name, writer in writers.items():
        comparison.replace_file(out / name, writer)
    return marked


def compare(asked: Options, console: Console) -> None:
    """Trains what is missing, and reports.

    Raises:
      ValueError: the flags, the data, a spec or a finished run do not fit.
    """
    sizes = preset(asked)
    corpus = data.load(asked.data, sizes.train.seq_len)
    quick = NAMES[:2] if asked.quick else NAMES
    chosen = entries(sizes, asked.only or quick)
    made = Runs(sizes, corpus, asked.out / "runs")
    if asked.fresh:
        made.kept.forget()
    seeds = range(sizes.seeds)
    found = {(x.name, seed): made.find(x, seed) for seed in seeds for x in chosen}
    console.print(f"{corpus.name}: {len(corpus.train):,} bytes to train on")
    for entry in chosen:
        if any(found[entry.name, seed] is None for seed in seeds):
            check_foresight(entry, sizes, console)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("all runs", total=len(found), now="")
        for seed, entry in itertools.product(seeds, chosen):
            if found[entry.name, seed] is None:
                found[entry.name, seed] = made.train(entry, seed, progress)
            progress.advance(whole)
    with console.status("timing steps"):
        ms = made.step_times(chosen)
    runs = {x.name: [found[x.name, seed] for seed in seeds] for x in chosen}
    rows = rows_of(chosen, runs, ms)
    said = description(sizes, rows)
    marked = write(asked.out, rows, runs, said)
    console.print(f"\n{comparison.text_table(rows)}\n\n{said}", highlight=False)
    console.print(f"wrote {asked.out}", highlight=False, soft_wrap=True)
    if asked.docs:
        comparison.insert(PAGE, marked)
        console.print(f"wrote {PAGE}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison; prints a mistake of the caller without a trace."""
    asked, console = options(arguments), Console()
    try:
        compare(asked, console)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on with the next run")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
