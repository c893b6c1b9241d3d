"""Combiner on a CPU: full attention at less than the square of the length.

    python benchmarks/combiner.py [--longest 16384] [--kinds fixed,logsparse,dense]

Compares Combiner-Fixed with spans of about ``sqrt(2 n)`` tokens and Combiner-Logsparse
with dense causal attention by the same kernels. Prints median milliseconds (f32, batch
1) and the exponent of a least-squares line through the logarithms of time over length.
Also prints what does not depend on the machine: the pairs and blocks that the three
maps of each visit (Logsparse: ``n * (log2(n) + 1)`` pairs, where the length is a power
of two), and the memory that the compiler plans for.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, stopwatch, table

import sadsl as sa
from sadsl import catalog
from sadsl.maps.base import IndexMap
from sadsl.terms.base import Spec, Term
from sadsl.terms.summaries import Summaries

HEADS, HEAD_DIM = 2, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
KINDS = ("fixed", "logsparse", "dense")


class Work(NamedTuple):
    """Pairs, and blocks of 128 x 128, that the maps of a spec visit for one head."""

    pairs: int
    blocks: int


def span_of(n: int) -> int:
    """The span with the least cost."""
    return isqrt(2 * n)


def spec_of(kind: str, n: int) -> Spec:
    match kind:
        case "fixed":
            return catalog.combiner_fixed(span_of(n))
        case "logsparse":
            return catalog.combiner_logsparse()
        case _:
            return sa.causal()


def work_of(spec: Spec, n: int) -> Work:
    """Sums the work of all maps that run for a spec."""
    if isinstance(spec, IndexMap):
        return _visited(spec, n, n)
    if isinstance(spec, Summaries):
        regions = spec.partition.num_regions(n)
        members = _visited(spec.partition.members(n), regions, n)
        return _sum([members, _visited(spec.partition.seen(n), n, regions)])
    assert isinstance(spec, Term)
    return _sum([work_of(part, n) for part in spec.parts])


def _visited(map: IndexMap, q_seq_len: int, kv_seq_len: int) -> Work:
    plan = sa.plan(map, q_seq_len, kv_seq_len)
    return Work(plan.num_pairs, plan.num_full + plan.num_partial)


def _sum(works: list[Work]) -> Work:
    return Work(*(sum(column) for column in zip(*works, strict=True)))


def with_backward(f: Callable, do: Any, *inputs: Any) -> Any:
    """The output, and all gradients."""
    out, pull = jax.vjp(f, *inputs)
    return out, pull(do)


class Side(NamedTuple):
    """A compiled call, and the temporary memory it needs, in MiB."""

    run: Callable[[], float]
    memory: float


def sides(n: int, kinds: list[str]) -> dict[str, Side]:
    """Every kind forward, and forward with backward."""
    rng = np.random.default_rng(0)
    shape = 1, n, HEADS, HEAD_DIM
    q, k, v, do = (
        jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(4)
    )
    found = {}
    for kind in kinds:
        forward = partial(sa.attention, spec=spec_of(kind, n))
        runs = {
            kind: (forward, (q, k, v)),
            f"{kind}, with backward": (partial(with_backward, forward), (do, q, k, v)),
        }
        for name, (f, inputs) in runs.items():
            compiled = jax.jit(f).lower(*inputs).compile()
            used = compiled.memory_analysis().temp_size_in_bytes
            found[name] = Side(stopwatch(compiled, *inputs), used / 2**20)
    return found


def exponent(lengths: list[int], values: list[float]) -> float:
    """The slope of the logarithm of a value over that of the length."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def rows(found: dict[str, dict[int, float]], lengths: list[int]) -> list[list[str]]:
    """One row for each name: the value at each length, and the exponent."""

    def text(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"

    return [
        [name, *(text(row[n]) for n in lengths),
         f"{exponent(lengths, [row[n] for n in lengths]):.2f}"]
        for name, row in found.items()
    ]  # fmt: skip


def speed_ups(ms: dict[str, dict[int, float]], lengths: list[int]) -> list[list[str]]:
    """How many times faster than dense attention each kind is."""
    pairs = [
        (name, f"dense{name.removeprefix(kind)}")
        for name in ms
        for kind in KINDS[:2]
        if name.startswith(kind)
    ]
    return [
        [name, *(f"{ms[dense][n] / ms[name][n]:.1f}" for n in lengths)]
        for name, dense in pairs
        if dense in ms
    ]


def main() -> None:
    """Measures, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    lengths = [n for n in LENGTHS if n <= args.longest]
    ms: dict[str, dict[int, float]] = {}
    memory: dict[str, dict[int, float]] = {}
    work: dict[str, dict[int, float]] = {}
    for n in lengths:
        for kind in kinds:
            counted = work_of(spec_of(kind, n), n)
            for what, count in zip(Work._fields, counted, strict=True):
                work.setdefault(f"{kind}: {what}", {})[n] = count
        made = sides(n, kinds)
        times = medians({name: side.run for name, side in made.items()}, args.rounds)
        for name, side in made.items():
            ms.setdefault(name, {})[n] = times[name]
            memory.setdefault(name, {})[n] = side.memory
    heads = [*(f"{n:,}" for n in lengths), "exponent"]
    print(machine("jax", "sadsl"))
    print(f"{HEADS} heads of {HEAD_DIM}, f32, batch 1; spans of sqrt(2 n) tokens\n")
    for title, found in {
        "Milliseconds": ms,
        "Temporary memory, MiB": memory,
        "Work of one head": work,
    }.items():
        print(table([title, *heads], rows(found, lengths)), end="\n\n")
    print(table(["Times faster than dense", *heads[:-1]], speed_ups(ms, lengths)))


if __name__ == "__main__":
    main()
