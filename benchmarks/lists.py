"""Choices of single keys by lists: time of choosing, attending, and dense attention.

    python benchmarks/lists.py [--lengths 8192 16384] [--kept 512] [--dense-to 32768]

On a CPU, f32, 8 query heads of 64 on one key head, an indexer of 4 heads of 32. For
each length: milliseconds of the choice, of attention with given lists and of
``causal()``, forward and with backward, as the least of runs that alternate; the ratios
of causal attention to attention with lists, and to that and the choice; the share of
the choice in the whole with backward; temporary memory of the whole; and the form that
the planner takes by itself. Beyond ``--dense-to`` tokens ``causal()`` is left out. The
last lines are exponents of time in n, from each length to the next.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, table

import sadsl as sa
from sadsl.run.lists import form_of
from sadsl.run.options import options_of
from sadsl.run.types import Setting

HEADS, DIM, INDEX_HEADS, INDEX_DIM = 8, 64, 4, 32
LISTS = sa.KernelConfig(lists=True)
LISTED = ("choose", "by list", "by list, both")
SIDES = (*LISTED, "dense", "dense, both")


class Arrays(NamedTuple):
    """q, k and v, and the operands of the index."""

    q: Any
    k: Any
    v: Any
    index: dict[str, Any]


def arrays(n: int) -> Arrays:
    """Normal queries, keys, values and index arrays."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((1, n, *shape), np.float32))

    index = {"iq": normal(INDEX_HEADS, INDEX_DIM), "ik": normal(1, INDEX_DIM)}
    index["iw"] = normal(INDEX_HEADS)
    return Arrays(normal(HEADS, DIM), normal(1, DIM), normal(1, DIM), index)


def spec_of(kept: int) -> sa.IndexMap:
    """The map of DeepSeek-V3.2 with ``kept`` keys."""
    return sa.causal() & sa.topk(
        kept, block=1, block_q=1, score=sa.dot("iq", "ik", "iw", "relu"),
        scope="shared", eligible=sa.causal(),
    )  # fmt: skip


def least(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least milliseconds of each side, in rounds that alternate."""
    found: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            begin = perf_counter()
            jax.block_until_ready(run())
            took = (perf_counter() - begin) * 1e3
            # The first round compiles.
            found[name] = min(found.get(name, np.inf), took) if turn else np.inf
    return found


class Measured(NamedTuple):
    """What was measured at one length: least milliseconds, MiB, the planner's form."""

    n: int
    kept: int
    ms: dict[str, float]
    memory: float
    form: str

    def line(self) -> list[str]:
        """A line of the table."""
        ms, kinds = self.ms, ("", ", both")
        ratios = ["-"] * 4
        if "dense" in ms:
            alone = [ms[f"dense{x}"] / ms[f"by list{x}"] for x in kinds]
            whole = [
                ms[f"dense{x}"] / (ms["choose"] + ms[f"by list{x}"]) for x in kinds
            ]
            ratios = [f"{x:.2f}" for x in (*alone, *whole)]
        times = [f"{ms[name]:.0f}" if name in ms else "-" for name in SIDES]
        share = ms["choose"] / (ms["choose"] + ms["by list, both"])
        end = [f"{share:.0%}", f"{self.memory:.0f}", self.form]
        return [f"{self.n:,}", f"{self.kept:,}", *times, *ratios, *end]


def measured(n: int, kept: int, rounds: int, dense: bool) -> Measured:
    """Times, memory and form at one length."""
    given, spec = arrays(n), spec_of(kept)

    def attend(spec: Any, operands: Any, q: Any, k: Any, v: Any) -> Any:
        return sa.attention(q, k, v, spec, operands=operands, config=LISTS)

    def backward(spec: Any, operands: Any, q: Any, k: Any, v: Any) -> Any:
        out = lambda *x: jnp.sum(attend(spec, operands, *x) ** 2)
        return jax.grad(out, (0, 1, 2))(q, k, v)

    choose = jax.jit(lambda q, k, x: sa.select(spec, q, k, operands=x, lists=True))
    listed = choose(given.q, given.k, given.index)
    qkv = given[:3]
    jits = {
        name: jax.jit(partial(run, this)) for name, run, this in (
            ("by list", attend, spec), ("by list, both", backward, spec),
            ("dense", attend, sa.causal()), ("dense, both", backward, sa.causal()),
        )
        if dense or "dense" not in name
    }  # fmt: skip
    sides = {"choose": lambda: choose(given.q, given.k, given.index)}
    for name, run in jits.items():
        operands = None if "dense" in name else listed
        sides[name] = partial(run, operands, *qkv)
    ms = least(sides, rounds)
    # ``backward`` takes the index arrays as operands here, so that it chooses.
    lowered = jits["by list, both"].lower(given.index, *qkv)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes / 2**20
    options = options_of((given.q, given.k), sa.softmax(spec), Setting(DIM**-0.5))
    form = "lists" if form_of(options, 1, {}) else "bits"
    return Measured(n, kept, ms, memory, form)


def exponents(found: list[Measured]) -> list[str]:
    """The exponents of time in n between neighbouring lengths of equal ``kept``."""
    lines = []
    for a, b in pairwise(found):
        if a.kept == b.kept and a.n < b.n:
            grown = {x: np.log(b.ms[x] / a.ms[x]) / np.log(b.n / a.n) for x in LISTED}
            shown = ", ".join(f"{x} {value:.2f}" for x, value in grown.items())
            lines.append(f"{a.n:,} to {b.n:,}, {a.kept} kept: {shown}")
    return lines


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--kept", nargs="+", type=int, default=[512])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dense-to", type=int, default=32768)
    args = parser.parse_args()
    names = ["choose", "list", "with backward", "causal", "with backward"]
    ratios = ["causal : list", "backward", "causal : all", "backward"]
    found = [
        measured(n, kept, args.rounds, n <= args.dense_to)
        for kept in args.kept
        for n in args.lengths
    ]
    head = ["n", "kept", *names, *ratios, "choosing", "MiB", "planner"]
    rows = [x.line() for x in found]
    parts = machine("jax", "sadsl"), table(head, rows), "\n".join(exponents(found))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
