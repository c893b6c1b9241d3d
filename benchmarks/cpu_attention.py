"""Sparse attention on a CPU against dense attention and against PyTorch.

    python benchmarks/cpu_attention.py --torch-python PATH/TO/VENV/bin/python

PyTorch runs in the given interpreter, which need not have JAX. Without one, its rows
are left out. Both sides alternate round by round. Times are medians, f32, batch 1.

    python benchmarks/cpu_attention.py --short

compares short inputs with ``jax.nn.dot_product_attention`` alone: causal, 8 heads of
64, one sequence and a batch of many, forward and with backward, and one query on 2,048
keys. The ratio is the median over rounds of our time divided by theirs.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternating, machine, medians, pin, stopwatch, table

import sadsl as sa

HEADS, HEAD_DIM, WINDOW = 4, 64, 511
SLIDING = sa.causal() & sa.window(WINDOW)
HOLES = (
    sa.causal()
    & (sa.window(383) | sa.sinks(64) | sa.blocks(1024))
    & ~sa.keys(1500, 2300)
)
LENGTHS = (4096, 8192, 16384, 32768)
# (batch, queries, keys) of --short, and the most that our time may be of theirs.
SHORT = (
    *((1, n, n) for n in (1, 8, 32, 128, 512)),
    *((4096 // n, n, n) for n in (1, 8, 32, 128, 512)),
    (4096, 8, 8), (1, 1, 2048), (16, 1, 2048),
)  # fmt: skip
SHORT_HEADS, MOST_RATIO = 8, 1.5

Arrays = tuple[jax.Array, ...]


class Torch:
    """PyTorch in another interpreter, which answers one measurement at a time."""

    def __init__(self, python: str, threads: int) -> None:
        script = Path(__file__).with_name("torch_cpu.py")
        self.process = subprocess.Popen(
            [python, str(script), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.version = self._read()["version"]

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the PyTorch process ended: see its message above")
        return json.loads(line)

    def stopwatch(self, name: str, seq_len: int) -> Callable[[], float]:
        """A function that returns the seconds of one run of a case of torch_cpu.py."""
        sizes = {"heads": HEADS, "head_dim": HEAD_DIM, "window": WINDOW}
        case = {"name": name, "seq_len": seq_len, **sizes}

        def run() -> float:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
            return self._read()["seconds"]

        return run

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def arrays(seq_len: int) -> Arrays:
    """q, k, v and the cotangent of the output, ``[batch, seq, heads, head_dim]``."""
    rng = np.random.default_rng(0)
    shape = 1, seq_len, HEADS, HEAD_DIM
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(4))


def forward(spec: sa.IndexMap) -> Callable[..., jax.Array]:
    """The output alone."""
    return jax.jit(lambda q, k, v, do: sa.attention(q, k, v, spec))


def with_gradient(spec: sa.IndexMap) -> Callable[..., Arrays]:
    """The output and the gradients of q, k and v."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Arrays:
        o, pull = jax.vjp(lambda *x: sa.attention(*x, spec), q, k, v)
        return (o, *pull(do))

    return run


@jax.jit
def dense(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> jax.Array:
    """JAX's own dense causal attention."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


class Row(dict):
    """One comparison as JSON; ``cells`` is its line of the table."""

    @property
    def cells(self) -> list[str]:
        """The comparison in words."""
        ours, other = f"{self['ms']:.1f}", f"{self['other_ms']:.1f}"
        ratio = f"{self['other_ms'] / self['ms']:.2f}x"
        return [
            self["what"], str(self["seq_len"]), ours, self["other"], other, ratio,
            self["wanted"],
        ]  # fmt: skip


def comparisons(other: Torch | None) -> list[tuple]:
    """(what, length, ours, the other's name, its stopwatch, the ratio wanted)."""
    found = []
    if other is not None:
        maps = ("window", SLIDING, ">= 1.3x"), ("causal", sa.causal(), ">= 1.3x")
        for what, spec, wanted in maps:
            for n in (4096, 8192, 16384):
                theirs = other.stopwatch(f"flex {what}", n)
                row = f"{what}, forward", n, forward(spec), "torch flex", theirs, wanted
                found.append(row)
        n = 16384
        causal = other.stopwatch("causal with gradient", n)
        found.append(
            ("window, with gradient", n, with_gradient(SLIDING), "torch causal sdpa",
             causal, ">= 3x")
        )  # fmt: skip
    against_dense = [
        ("window, forward", 8192, SLIDING, ">= 10x"),
        ("causal, forward", 4096, sa.causal(), ""),
        ("causal, forward", 8192, sa.causal(), ""),
        ("window, sinks, blocks, holes", 8192, HOLES, ""),
    ]
    for what, n, spec, wanted in against_dense:
        run = stopwatch(dense, *arrays(n))
        found.append((what, n, forward(spec), "jax.nn causal", run, wanted))
    return found


def compare(other: Torch | None, rounds: int) -> list[Row]:
    """All comparisons, each in rounds that alternate."""
    rows = []
    for what, n, ours, name, theirs, wanted in comparisons(other):
        sides = {"sadsl": stopwatch(ours, *arrays(n)), name: theirs}
        ms = medians(sides, rounds)
        row = Row(
            what=what, seq_len=n, ms=ms["sadsl"], other=name, other_ms=ms[name],
            wanted=wanted,
        )  # fmt: skip
        print("  ".join(row.cells), flush=True)
        rows.append(row)
    return rows


def short_sides(batch: int, queries: int, keys: int, gradient: bool) -> dict:
    """Both sides of one comparison of --short, compiled; each is ``f(q, k, v, do)``."""

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return sa.attention(q, k, v, sa.causal(), q_offset=keys - queries)

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        causal = queries == keys
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def side(f: Callable) -> Any:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Arrays:
            if not gradient:
                return (f(q, k, v),)
            o, pull = jax.vjp(f, q, k, v)
            return (o, *pull(do))

        of = (jax.ShapeDtypeStruct((batch, n, SHORT_HEADS, HEAD_DIM), jnp.float32)
              for n in (queries, keys, keys, queries))  # fmt: skip
        return jax.jit(run).lower(*of).compile()

    return {"sadsl": side(ours), "jax.nn": side(theirs)}


def short(rounds: int) -> list[dict[str, Any]]:
    """The comparisons of --short: milliseconds, ratios and FLOPs of both sides."""
    rows = []
    rng = np.random.default_rng(0)
    for batch, queries, keys in SHORT:
        given = [
            jnp.asarray(
                rng.standard_normal((batch, n, SHORT_HEADS, HEAD_DIM), np.float32)
            )
            for n in (queries, keys, keys, queries)
        ]
        for gradient in (False, True):
            sides = short_sides(batch, queries, keys, gradient)
            watches = {name: stopwatch(f, *given) for name, f in sides.items()}
            ms = alternating(watches, rounds)
            pairs = zip(ms["sadsl"], ms["jax.nn"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            row = {
                "batch": batch, "queries": queries, "keys": keys, "gradient": gradient,
                "ratio": ratio, "holds": ratio <= MOST_RATIO,
                **{f"{n} ms": statistics.median(x) for n, x in ms.items()},
                **{f"{n} flops": f.cost_analysis()["flops"] for n, f in sides.items()},
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def memory() -> list[dict[str, Any]]:
    """Temporary bytes of the compiled window map by length: they grow with it."""

    def temp(f: Callable, n: int) -> int:
        shape = jax.ShapeDtypeStruct((1, n, HEADS, HEAD_DIM), jnp.float32)
        return f.lower(*[shape] * 4).compile().memory_analysis().temp_size_in_bytes

    make = {"forward": forward, "with_gradient": with_gradient}
    return [
        {"seq_len": n, **{name: temp(f(SLIDING), n) for name, f in make.items()}}
        for n in LENGTHS
    ]


def main() -> None:
    """Prints the tables and, if asked, writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", help="an interpreter with torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--short", action="store_true", help="short inputs alone")
    options = parser.parse_args()
    pin(options.threads)
    line = machine("jax", "numpy")
    if options.short:
        print(line, flush=True)
        rows = short(options.rounds)
        lines = [
            [f"{r['batch']} x {r['queries']} on {r['keys']}",
             "with gradient" if r["gradient"] else "forward",
             f"{r['sadsl ms']:.3f}", f"{r['jax.nn ms']:.3f}", f"{r['ratio']:.2f}",
             f"{r['sadsl flops'] / max(r['jax.nn flops'], 1):.2f}"]
            for r in rows
        ]  # fmt: skip
        head = ["batch x queries", "", "ms", "jax.nn ms", "ratio", "FLOPs"]
        print("\n" + table(head, lines))
        if options.out is not None:
            report = {"machine": line, "short": rows}
            options.out.write_text(json.dumps(report, indent=2) + "\n")
        return
    other = None
    if options.torch_python is None:
        print("no --torch-python: the rows against PyTorch are left out")
    else:
        other = Torch(options.torch_python, options.threads)
        line += f", torch {other.version}"
    print(f"{line}\nheads {HEADS}, head_dim {HEAD_DIM}, window {WINDOW}\n", flush=True)

    rows = compare(other, options.rounds)
    head = ["map", "length", "ms", "against", "ms", "ratio", "wanted"]
    print("\n" + table(head, [row.cells for row in rows]), end="\n\n")
    if other is not None:
        other.close()

    sizes = memory()
    mib = "{:.1f}".format
    lines = [
        [str(s["seq_len"]), mib(s["forward"] / 2**20), mib(s["with_gradient"] / 2**20)]
        for s in sizes
    ]
    print(table(["length", "forward, MiB", "with gradient, MiB"], lines))
    if options.out is not None:
        report = {"machine": line, "rows": rows, "memory": sizes}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
