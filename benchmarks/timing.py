"""Timing for the benchmarks: rounds that alternate, medians, a table, the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

REST_SECONDS = 0.3


def pin(threads: int) -> None:
    """Keeps this process and its children on ``threads`` cores.

    Call it before the first JAX computation: that sets the size of the thread pool.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine(*packages: str) -> str:
    """The CPU, its cores and the versions of what runs on it, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
    versions = [f"{name} {version(name)}" for name in packages]
    python = f"python {platform.python_version()}"
    return ", ".join([cpu, f"{cores} cores", python, *versions])


def stopwatch(f: Callable, *args: Any) -> Callable[[], float]:
    """A function that runs ``f(*args)`` to the end and returns its seconds."""

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        return time.perf_counter() - begin

    return run


def alternating(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds by side and round; a round runs every side, so that noise is shared.

    Before each timed call there is a rest and a call that is not timed: the threads of
    the other side spin for a while after their work, and its arrays fill the caches. A
    call before the first round compiles.
    """
    for run in sides.values():
        run()

    def rested(run: Callable[[], float]) -> float:
        time.sleep(REST_SECONDS)
        run()
        return 1e3 * run()

    ms = [[rested(run) for run in sides.values()] for _ in range(rounds)]
    return dict(zip(sides, map(list, zip(*ms, strict=True)), strict=True))


def medians(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side, over rounds that alternate."""
    found = alternating(sides, rounds)
    return {name: statistics.median(ms) for name, ms in found.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([text(head), "  ".join("-" * w for w in widths), *map(text, rows)])
