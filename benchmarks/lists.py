"""Choices of single keys by lists: time of choosing, attending, and dense attention.

    python benchmarks/lists.py [--lengths 8192 16384] [--kept 512] > results/lists.txt

On a CPU, f32, 8 query heads of 64 on one key head, an indexer of 4 heads of 32. For
each length: milliseconds of the choice, of attention with given lists and of
``causal()``, forward and with backward, as the least of runs that alternate; the ratios
of causal attention to attention with lists, and to that and the choice; temporary
memory of the whole call with backward; and the form that the planner takes by itself.
"""

import argparse
from collections.abc import Callable
from functools import partial
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


def row(n: int, kept: int, rounds: int) -> list[str]:
    """A line of the table."""
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
    }  # fmt: skip
    sides = {"choose": lambda: choose(given.q, given.k, given.index)}
    for name, run in jits.items():
        operands = None if "dense" in name else listed
        sides[name] = partial(run, operands, *qkv)
    ms = least(sides, rounds)
    ratio = {x: ms[f"dense{x}"] / ms[f"by list{x}"] for x in ("", ", both")}
    whole = {
        x: ms[f"dense{x}"] / (ms["choose"] + ms[f"by list{x}"]) for x in ("", ", both")
    }
    # ``backward`` takes the index arrays as operands here, so that it chooses.
    lowered = jits["by list, both"].lower(given.index, *qkv)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes / 2**20
    options = options_of((given.q, given.k), sa.softmax(spec), Setting(DIM**-0.5))
    form = "lists" if form_of(options, 1, {}) else "bits"
    times = [f"{ms[name]:.0f}" for name in sides]
    ratios = [f"{x:.2f}" for x in (*ratio.values(), *whole.values())]
    return [f"{n:,}", f"{kept:,}", *times, *ratios, f"{memory:.0f}", form]


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--kept", nargs="+", type=int, default=[512])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    names = ["choose", "list", "with backward", "causal", "with backward"]
    ratios = ["causal : list", "backward", "causal : all", "backward"]
    rows = [row(n, kept, args.rounds) for n in args.lengths for kept in args.kept]
    head = ["n", "kept", *names, *ratios, "MiB", "planner"]
    print("\n\n".join([machine("jax", "sadsl"), table(head, rows)]))


if __name__ == "__main__":
    main()
