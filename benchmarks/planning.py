"""Planning time, beside jax's splash attention and torch's FlexAttention.

    python benchmarks/planning.py [--torch-python PATH] [--peers]

Medians of 5 on one core. The peers evaluate all n*n pairs, so they get smaller sizes.
torch runs in the interpreter of ``--torch-python`` (torch 2.13, CPU).

With ``--catalogue [NAME ...]``, instead every static mechanism of the catalogue at
about a million positions (the rule is that of ``catalog_cases.cases(16)``), or
those whose names hold a NAME: CPU time of lowering, of the search for an order and of
the forward plan in it. The bar is 100 ms a distinct map and 0.1 us a run, or 1 s for
maps with tables. The best of three counts, and a case stops after a minute.

With ``--more``, instead what the other lists leave out: ragged lengths, sinks in
strips, run-time operands (whose plans hold for any values), and beside the plan the
CPU time of ``properties``, ``cache`` and ``explain`` at these lengths.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from catalog_cases import Case, cases
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as splash_info,
)
from timing import machine, table

import sadsl as sa
from lowering import ir, pipeline
from lowering.expr import heads
from lowering.order import relayout
from lowering.order.judge import Maps

BLOCK = 128
ROUNDS = 5
SPECS = [
    "causal()",
    "causal() & window(4096)",
    "causal() & (window(4096) | sinks(64))",
    "causal() & (window(512) | sinks(128) | blocks(2048))",
    "blocks(4096)",
]
# The longest planning time by number of positions, for all specs above.
BARS_MS = {65_536: 10.0, 1_048_576: 60.0}
# A length that no block divides, and one that all do.
RAGGED, EVEN = 1_048_573, 1_048_576
MORE = [
    ("causal()", RAGGED),
    ("causal() & window(4096)", RAGGED),
    ("causal() & (window(4096) | sinks(64))", RAGGED),
    ("causal() & (window(8192) | strided(1024))", RAGGED),
    ("causal() & blocks(4096)", RAGGED),
    ("causal() & (window(512) | sinks(100)) & ~blocks(300)", EVEN),
    ("causal() & (window(1000) | strided(1000) | sinks(7))", EVEN),
    ("causal() & segments()", EVEN),
    ("causal() & where(lambda q, k: k >= operand('start')[q])", EVEN),
    ("window(4096) & where(lambda q, k: operand('keep')[k // 64] == 1)", EVEN),
]
# What ``lru_cache`` makes of a function.
Cached = type(lru_cache(len))
# A case of the catalogue stops after so many seconds. The best of some rounds counts,
# since other work on a machine only adds to CPU time.
LONGEST_S = 60
CATALOGUE_ROUNDS = 3

TORCH = """
import json, sys, time, torch
from torch.nn.attention.flex_attention import create_block_mask
torch.set_num_threads(1)
MODS = {
    "causal()": lambda b, h, q, k: k <= q,
    "causal() & window(4096)": lambda b, h, q, k: (k <= q) & (q - k <= 4096),
    "causal() & (window(4096) | sinks(64))":
        lambda b, h, q, k: (k <= q) & ((q - k <= 4096) | (k < 64)),
    "causal() & (window(512) | sinks(128) | blocks(2048))":
        lambda b, h, q, k: (k <= q)
        & (((q - k <= 512)) | (k < 128) | (q // 2048 == k // 2048)),
    "blocks(4096)": lambda b, h, q, k: q // 4096 == k // 4096,
}
for name, mod in MODS.items():
    for n in json.loads(sys.argv[1]):
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            create_block_mask(mod, None, None, n, n, device="cpu", BLOCK_SIZE=128)
            spent.append(time.perf_counter() - start)
        print(json.dumps([name, n, sorted(spent)[1]]), flush=True)
"""


def median_ms(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Milliseconds of ``run()``, the median of some rounds."""
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return 1e3 * float(np.median(spent))


def forget() -> None:
    """Empties all caches of the compiler."""
    mine = [m for name, m in sys.modules.items() if name.split(".")[0] == "lowering"]
    for cached in {id(x): x for module in mine for x in vars(module).values()}.values():
        if isinstance(cached, Cached):
            cached.cache_clear()


def plan_uncached(text: str, n: int) -> sa.Plan:
    """Plans from the text, without any cache."""
    forget()
    return sa.plan(text, n, block_q=BLOCK, block_kv=BLOCK)


def splash_mask(text: str, n: int) -> splash.Mask | None:
    """The same map in splash's classes, where splash has it."""
    causal = splash.CausalMask((n, n))
    near = splash.LocalMask((n, n), (4096, 0), 0)
    masks = {"causal()": causal, "causal() & window(4096)": causal & near}
    return masks.get(text)


def splash_ms(text: str, n: int) -> float | None:
    mask = splash_mask(text, n)
    if mask is None:
        return None
    many = splash.MultiHeadMask([mask])

    def run() -> None:
        splash_info.process_mask(many, (BLOCK, BLOCK), head_shards=1, q_seq_shards=1)

    return median_ms(run, 1)


def torch_ms(python: str | None, sizes: list[int]) -> dict[tuple[str, int], float]:
    """Milliseconds by (spec, n), from another interpreter."""
    if python is None:
        return {}
    command = [python, "-c", TORCH, json.dumps(sizes)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    return {(name, n): 1e3 * seconds for name, n, seconds in rows}


def arranged(case: Case, stages: pipeline.Stages, block: int) -> list[pipeline.Stages]:
    """The stages in the best order; one for each range of heads with its own order."""
    program = stages["simplify"]
    maps = Maps(program.maps, program.map_of_head)
    found = relayout.apart(maps, program.sizes_in(block, block))
    if len(found) == 1:
        return [pipeline.arrange(stages, block, block)]
    nodes = heads.per_head(case.spec.node, case.num_heads)
    own = (
        pipeline.run(nodes[r.start], pipeline.Problem(case.n, case.n, len(r)))
        for r in found
    )
    return [pipeline.arrange(x, block, block) for x in own]


class Planned(NamedTuple):
    """What one case gave: CPU seconds of its steps, its maps and the runs."""

    steps: np.ndarray
    maps: tuple[ir.Pred, ...]
    runs: int


def planned(case: Case) -> Planned:
    """Lowers, searches an order and plans a case, with empty caches."""
    forget()
    marks = [time.process_time()]
    problem = pipeline.Problem(case.n, case.n, case.num_heads)
    stages = pipeline.run(case.spec.node, problem)
    marks.append(time.process_time())
    parts = arranged(case, stages, BLOCK)
    marks.append(time.process_time())
    masks = [pipeline.block_mask(part, BLOCK, BLOCK) for part in parts]
    marks.append(time.process_time())
    runs = sum(len(mask.run_start) for mask in masks)
    return Planned(np.diff(marks), stages.planned.maps, runs)


def catalogue_row(case: Case) -> list[str]:
    """One line of the table of the catalogue."""
    found: list[Planned] = []
    with alarm(LONGEST_S):
        for _ in range(CATALOGUE_ROUNDS):
            found.append(planned(case))
    if not found:
        return [case.name, f"{case.n:,}", f"over {LONGEST_S} s", *"-----", "MISSES"]
    best = min(found, key=lambda x: x.steps.sum())
    steps = 1e3 * best.steps
    tables = any(isinstance(x, ir.Table) for m in best.maps for x in ir.walk(m))
    bar = max(1000.0 * tables, 100 * len(best.maps) + 1e-4 * best.runs)
    verdict = "meets" if steps.sum() <= bar else "MISSES"
    return [
        case.name, f"{case.n:,}", f"{steps.sum():,.0f}", *(f"{x:,.0f}" for x in steps),
        f"{len(best.maps)}", f"{best.runs:,}", f"{verdict} {bar:,.0f} ms",
    ]  # fmt: skip


def within(run: Callable[[], object]) -> str:
    """Milliseconds of CPU time with empty caches, or that it took too long."""
    forget()
    start, found = time.process_time(), f"over {LONGEST_S} s"
    with alarm(LONGEST_S):
        try:
            run()
            found = f"{1e3 * (time.process_time() - start):,.0f}"
        except (ValueError, NotImplementedError) as error:
            found = type(error).__name__
    return found


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Leaves the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except TimeoutError:
        pass
    finally:
        signal.alarm(0)


def more_row(text: str, n: int) -> list[str]:
    """One line of the table of ``--more``."""
    spec = sa.parse(text)
    shape = jax.ShapeDtypeStruct((1, n, 1, 64), jnp.bfloat16)
    shapes = {"start": ("int32", n), "keep": ("int32", n // 64)}
    operands = {
        name: jax.ShapeDtypeStruct((length,), dtype)
        for name, (dtype, length) in shapes.items()
        if name in text
    }
    if "segments()" in text:
        row = jax.ShapeDtypeStruct((1, n), jnp.int32)
        operands |= {"q_segment_ids": row, "kv_segment_ids": row}

    def explain() -> object:
        low = sa.lower(spec, shape, shape, shape, operands=operands, target="tpu-v5e")
        return low.explain()

    plan = sa.plan(spec, n, block_q=BLOCK, block_kv=BLOCK)
    return [
        text, f"{n:,}", within(lambda: plan_uncached(text, n)), f"{plan.num_runs:,}",
        within(lambda: sa.properties(spec, n)), within(lambda: sa.cache(spec, n)),
        within(explain),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", help="an interpreter with torch 2.13")
    parser.add_argument("--peer-sizes", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--catalogue", nargs="*", help="names of the catalogue")
    parser.add_argument("--more", action="store_true", help="lengths, operands, facts")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    if args.catalogue is not None:
        print_catalogue(args.catalogue)
        return
    if args.more:
        print(machine("jax", "numpy"))
        head = ["spec", "n", "plan ms", "runs", "properties ms", "cache ms",
                "explain ms"]  # fmt: skip
        print(table(head, [more_row(*case) for case in MORE]))
        return
    peers = torch_ms(args.torch_python, args.peer_sizes)
    rows = []
    for text in SPECS:
        for n in (*args.peer_sizes, *BARS_MS):
            ours = median_ms(lambda text=text, n=n: plan_uncached(text, n))
            plan = plan_uncached(text, n)
            theirs = splash_ms(text, n) if n in args.peer_sizes else None
            rows.append(
                [text, f"{n:,}", f"{ours:.2f}", _ms(theirs), _ms(peers.get((text, n))),
                 f"{plan.num_runs:,}", f"{plan.nbytes:,}", _bar(ours, n)]
            )  # fmt: skip
    print(machine())
    head = ["spec", "n", "sadsl ms", "splash ms", "torch ms", "runs", "bytes", "bar"]
    print(table(head, rows))


def print_catalogue(names: list[str]) -> None:
    """Prints the table of the catalogue."""
    chosen = [c for c in cases(16) if not names or any(x in c.name for x in names)]
    rows = [catalogue_row(case) for case in chosen]
    print(machine())
    head = ["map", "n", "ms", "lower", "search", "plan", "maps", "runs", "bar"]
    print(table(head, rows))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _bar(ms: float, n: int) -> str:
    if n not in BARS_MS:
        return ""
    return f"{'meets' if ms <= BARS_MS[n] else 'MISSES'} {BARS_MS[n]:.0f} ms"


if __name__ == "__main__":
    main()
