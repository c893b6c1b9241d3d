"""Trains a byte-level language model with dense and with sparse attention.

    python examples/train_lm.py
    python examples/train_lm.py --spec="causal() & (window(128) | strided(64))"
    python examples/train_lm.py --spec=routing --spec="causal() & topk(4, block=64)"
    python examples/train_lm.py --data=/usr/share/doc --seq_len=4096 --steps=2000

The first run is always dense, ``causal()``. Each ``--spec`` is trained beside it, from
the same weights on the same batches. The data are the sources of Python's standard
library, or any file or folder. To go on with a killed run, give the same command again:
it starts from the last checkpoint and ends with the losses it would have had. The table
and the pictures are written to ``--out``, and the numbers of each step to
``dense.jsonl`` and ``sparse.jsonl`` while a run goes on. A run whose loss or gradient
is not finite stops with exit status 1.

    python examples/train_lm.py --mesh=batch=2,sequence=4 --devices=8
    python examples/launch.py --processes=2 --devices=4 -- \\
        python examples/train_lm.py --mesh=batch=2,sequence=4

Several devices, of one process or of several, train one model: the losses and the
checkpoints are those of one device up to rounding, and a run may go on with another
number of devices or processes. On a TPU pod or a GPU cluster, start this script once on
each host, with ``jax.distributed.initialize()`` in the place of ``processes.join()``
in ``examples/lm/options.py``.
"""

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
from absl import app, flags, logging
from lm import data, options, processes, report
from lm.checkpoints import Checkpoints, History, forget
from lm.finite import NotFinite
from lm.mesh import ONE_DEVICE, Devices
from lm.metrics import Metrics
from lm.model import ROUTING, Spec, routing_for, text_of
from lm.options import devices_of, mesh_text, settings
from lm.profiling import Profile
from lm.training import Result, compile_run, identity, train
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import sadsl as sa
from sadsl.run.agree import check_agreement
from sadsl.selections.base import selections_of

DENSE = "causal()"

_SPEC = flags.DEFINE_multi_string(
    "spec", ["causal() & (window(128) | sinks(8))"], "A spec to compare with causal()."
)
_DATA = flags.DEFINE_string("data", None, "A file or a folder; None: Python's sources.")
_OUT = flags.DEFINE_string("out", "out/train_lm", "Where results and checkpoints go.")
_FRESH = flags.DEFINE_bool("fresh", False, "Delete the checkpoints and start over.")
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Steps of each run to trace into --out.", lower_bound=0
)
flags.adopt_module_key_flags(options)  # --help shows them


def read_spec(text: str, seq_len: int, num_heads: int) -> Spec:
    """Reads a spec and makes sure that no query sees the byte that it predicts.

    A map that content decides may see no more than the rest of the map allows.

    Raises:
      ValueError: it is not a spec, it reads run-time arrays, or it sees the future.
    """
    if text == ROUTING:
        return routing_for(seq_len)
    spec = sa.parse(text)
    if not isinstance(spec, sa.IndexMap | sa.Softmax):
        raise ValueError(  # noqa: TRY004 - a flag, said without a trace
            f"--spec={text!r} must be a map, softmax(map), or {ROUTING!r}"
        )
    seen = spec.map if isinstance(spec, sa.Softmax) else spec
    chosen = selections_of(seen)
    names = [name for s in chosen for name in s.operands]
    names += [
        name
        for name in sa.plan(seen, 1, num_heads=num_heads, relayout=False).operands
        if not any(s.owns(name) for s in chosen)
    ]
    if names:
        raise ValueError(
            f"--spec={text!r} reads the run-time arrays {names}, and "
            "this script has none to pass: leave them out"
        )
    if not sa.properties(seen, seq_len, num_heads=num_heads).causal:
        raise ValueError(
            f"--spec={text!r} has pairs in which a query sees a later key, so a byte "
            f"would be predicted from itself: write causal() & ({text})"
        )
    return spec


def open_checkpoints(name: str, spec: Spec, corpus: data.Corpus) -> Checkpoints:
    """Opens the checkpoints of a run, which its name and its flags determine."""
    folder = Path(_OUT.value) / "checkpoints" / name
    return Checkpoints(folder, identity(spec, *settings(), corpus))


def advice(name: str, error: NotFinite, checkpoints: Checkpoints) -> str:
    """What to say of a run that diverged."""
    model, config = settings()
    newest = checkpoints.newest
    kept = (
        "There is no checkpoint from before it."
        if newest is None
        else f"The last good checkpoint is {newest}."
    )
    tries = [
        f"a smaller --learning_rate (now {config.learning_rate:g})",
        f"more --warmup_steps (now {config.warmup_steps})",
        f"a smaller --clip_norm (now {config.clip_norm:g})",
    ]
    if model.dtype != "float32":
        tries.append(f"--dtype=float32 (now {model.dtype})")
    return (
        f"{name}: {error}. {kept} The same command would stop at the same step: try "
        f"{', '.join(tries[:-1])} or {tries[-1]}, with another --out or with --fresh"
    )


def run_one(
    name: str,
    spec: Spec,
    corpus: data.Corpus,
    console: Console,
    devices: Devices = ONE_DEVICE,
) -> Result:
    """Trains one model, or continues training it, and prints its progress."""
    sizes, config = settings()
    shown = escape(repr(spec))
    console.print(f"\n[bold]{name}[/bold]: {shown}", highlight=False)
    with console.status("compiling"):
        compiled = compile_run(spec, sizes, config, devices)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    first = processes.is_first()
    traced = _PROFILE.value if first else 0
    metrics = Metrics(Path(_OUT.value) / f"{name}.jsonl", config, writes=first)
    with (
        open_checkpoints(name, spec, corpus) as checkpoints,
        Progress(*columns, console=console, transient=True) as progress,
        Profile(Path(_OUT.value) / "profile" / name, traced) as profile,
    ):
        state, history = checkpoints.restore(compiled.state) or (None, History())
        if history.step:
            say = f"  going on from step {history.step:,} of {config.steps:,}"
            progress.console.print(say, highlight=False)
        metrics.start(history)
        task = progress.add_task("", total=config.steps, completed=history.step, now="")

        def tell(history: History) -> None:
            metrics.append(history)
            now = (
                f"{history.train[-1]:.3f} bits/byte  "
                f"{config.tokens_per_step / history.seconds[-1]:,.0f} tokens/s"
            )
            progress.update(task, completed=history.step, now=now)
            step, bits = history.valid[-1] if history.valid else (0, 0.0)
            if step == history.step:
                say = (
                    f"  step {step:>5,} of {config.steps:,}   train "
                    f"{history.train[-1]:.3f}   validation {bits:.3f} bits/byte"
                )
                progress.console.print(say, highlight=False)

        try:
            train(
                compiled, state, history, config, corpus,
                keep=checkpoints.save, tell=tell, around=profile.step,
            )  # fmt: skip
        except NotFinite as error:
            raise NotFinite(advice(name, error, checkpoints)) from error
    if _PROFILE.value:
        console.print(f"  {profile.said}", highlight=False, soft_wrap=True)
    return Result(text_of(spec), history, compiled.num_params, compiled.memory_bytes)


def setting(corpus: data.Corpus, result: Result) -> dict[str, str | int | float]:
    """What the numbers were measured with."""
    model, config = settings()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "device": f"{jax.devices()[0].device_kind} x{os.cpu_count()}",
        "mesh": mesh_text() or "one device",
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "data": corpus.name,
        "train_bytes": len(corpus.train),
        "valid_bytes": len(corpus.valid),
        "parameters": result.num_params,
        **asdict(model),
        **asdict(config),
        # Of the whole process, all models together; macOS counts bytes, others KiB.
        "process_peak_mib": peak // (2**20 if sys.platform == "darwin" else 2**10),
    }


def check_processes(runs: dict[str, Spec], corpus: data.Corpus) -> None:
    """Makes sure that all processes train the same models on the same data.

    Raises:
      ValueError: some process has another spec, flag, text or version of jax.
    """
    sizes, config = settings()
    check_agreement(
        None,
        {
            "jax": jax.__version__,
            "mesh": mesh_text(),
            **identity(runs["dense"], sizes, config, corpus),
            "spec": [repr(spec) for spec in runs.values()],
            "checkpoint_every": config.checkpoint_every,
            "valid_every": config.valid_every,
            "fresh": _FRESH.value,
        },
    )


def compare(console: Console) -> None:
    """Trains one model for each spec of the flags, one after the other, and reports.

    Raises:
      ValueError: the flags, the data or the checkpoints do not fit.
    """
    sizes, config = settings()
    devices = devices_of(config)
    specs = [read_spec(text, config.seq_len, sizes.num_heads) for text in _SPEC.value]
    corpus = data.load(_DATA.value, config.seq_len)
    names = ["dense", "sparse", *(f"sparse-{i}" for i in range(2, len(specs) + 1))]
    runs = dict(zip(names, [sa.parse(DENSE), *specs], strict=False))
    check_processes(runs, corpus)
    if _FRESH.value:
        if processes.is_first():
            for name in runs:
                forget(Path(_OUT.value) / "checkpoints" / name)
        processes.wait_for_all("old checkpoints are deleted")
    # Mistakes in a later run are reported before the first run starts.
    for name, spec in runs.items():
        with open_checkpoints(name, spec, corpus) as checkpoints:
            checkpoints.check()
    console.print(
        f"{corpus.name}: {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.valid):,} to validate on",
        highlight=False,
    )
    results = [
        run_one(name, spec, corpus, console, devices) for name, spec in runs.items()
    ]
    if processes.is_first():
        write(results, corpus, console)
    processes.wait_for_all("results are written")


def write(results: Sequence[Result], corpus: data.Corpus, console: Console) -> None:
    """Writes and prints the comparison."""
    sizes, config = settings()
    rows = [report.row(result, sizes, config) for result in results]
    console.print()
    console.print(report.table(rows))
    said = setting(corpus, results[0])
    for path in report.write(Path(_OUT.value), results, rows, said, config):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def outcome(console: Console) -> int:
    """Runs the comparison; prints a mistake of the caller without a trace."""
    try:
        compare(console if processes.is_first() else Console(quiet=True))
    except NotFinite as error:
        console.print(f"stopped: {error}", style="red", highlight=False, markup=False)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        said = str(error).partition("\n")[0]
        console.print(
            f"stopped: this process cannot go on without the others ({said}): the same "
            "command goes on from the last checkpoint",
            style="red", highlight=False, markup=False,
        )  # fmt: skip
        return 1
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from the last checkpoint")
        return 130
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the comparison in this process, of one or of several."""
    logging.set_verbosity(logging.WARNING)
    console = Console()
    if len(argv) > 1:
        console.print(f"unknown arguments {argv[1:]}: every option is a --flag")
        return 2
    options.start()
    status = outcome(console)
    if status:
        processes.leave(status)
    return status


if __name__ == "__main__":
    app.run(main)
