"""The Triton kernels on a GPU: checks them against float64, then times them.

    python benchmarks/gpu_attention.py --out gpu_attention.json

They are timed against jax.nn. Without a GPU only `--interpret` runs: the comparison
with float64, at small sizes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, table

import sadsl as sa

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
MAPS = {
    "full": sa.full(),
    "causal": sa.causal(),
    "window": sa.causal() & sa.window(100),
    "window and sinks": sa.causal() & (sa.window(70) | sa.sinks(4)),
    "strided": sa.causal() & sa.strided(7),
    "blocks": sa.blocks(96),
    "empty rows": sa.causal() & sa.keys(50, 10_000),
    "segments": sa.causal() & sa.segments(),
    "per head": sa.per_head(sa.causal(), sa.window(30, 30)),
}
WINDOW = 1023
TIMED = {
    "causal": (sa.causal(), {"is_causal": True}),
    f"causal & window({WINDOW})": (
        sa.causal() & sa.window(WINDOW),
        {"is_causal": True, "local_window_size": (WINDOW, 0)},
    ),
}
# jax.nn's "xla" builds all scores: past this many bytes of them it is left out.
DENSE_LIMIT = 8 * 2**30

Arrays = tuple[jax.Array, ...]


def arrays(
    batch: int, seq_len: int, heads: tuple[int, int], head_dim: int, dtype: str
) -> Arrays:
    """q, k, v and the cotangent of the output."""
    rng = np.random.default_rng(0)
    shapes = [(batch, seq_len, heads[i], head_dim) for i in (0, 1, 1, 0)]
    return tuple(
        jnp.asarray(rng.standard_normal(s, dtype=np.float32), dtype) for s in shapes
    )


def with_gradient(attend: Callable) -> Callable:
    """``f(q, k, v, do) -> o, dq, dk, dv``, jitted."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Arrays:
        o, pull = jax.vjp(attend, q, k, v)
        return (o, *pull(do))

    return run


def forward_only(attend: Callable) -> Callable:
    """``f(q, k, v, do) -> o``, jitted."""
    return jax.jit(lambda q, k, v, do: attend(q, k, v))


def errors(spec: sa.IndexMap, dtype: str, seq_len: int, interpret: bool) -> list[float]:
    """Errors of o, dq, dk, dv against float64, relative to the largest value."""
    head_dim = 32 if interpret else 128
    inputs = arrays(2, seq_len, (4, 2), head_dim, dtype)
    options: dict[str, Any] = {}
    if "segments" in repr(spec):
        ids = jnp.asarray(np.arange(seq_len) // 61 + np.arange(2)[:, None], jnp.int32)
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids}
    kernel = partial(
        sa.attention, spec=spec, impl="triton", interpret=interpret, **options
    )
    actual = with_gradient(kernel)(*inputs)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        dense = partial(sa.attention, spec=spec, impl="reference", **options)
        expected = with_gradient(dense)(*wide)
    found = []
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        found.append(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
    return found


def check(interpret: bool) -> tuple[list[dict], bool]:
    """Prints the errors of each map and dtype; whether all are within tolerance."""
    # An interpreted kernel takes seconds to compile, whatever its size.
    seq_len, dtypes = (150, ("float32",)) if interpret else (1000, TOLERANCE)
    rows = []
    for name, spec in MAPS.items():
        for dtype in dtypes:
            limit = TOLERANCE[dtype]
            found = errors(spec, dtype, seq_len, interpret)
            ok = bool(np.isfinite(found).all() and max(found) <= limit)
            row = dict(zip(("o", "dq", "dk", "dv"), found, strict=True))
            rows.append({"map": name, "dtype": dtype, **row, "ok": ok})
    shown = []
    for row in rows:
        numbers = [f"{row[x]:.1e}" for x in ("o", "dq", "dk", "dv")]
        verdict = "ok" if row["ok"] else "WRONG"
        shown.append([row["map"], row["dtype"], *numbers, verdict])
    head = ["map", "dtype", "o", "dq", "dk", "dv", ""]
    print(table(head, shown), end="\n\n")
    return rows, all(r["ok"] for r in rows)


def contenders(options: dict, spec: sa.IndexMap, scores_bytes: int) -> dict:
    """Attention functions by name, or the reason why one is not run."""

    def peer(implementation: str) -> Callable:
        return partial(
            jax.nn.dot_product_attention, implementation=implementation, **options
        )

    large = f"all scores take {scores_bytes / 2**30:.0f} GiB"
    return {
        "sadsl": partial(sa.attention, spec=spec, impl="triton"),
        "jax cudnn": peer("cudnn"),
        "jax xla": peer("xla") if scores_bytes <= DENSE_LIMIT else large,
    }


def several(run: Callable, inputs: Arrays) -> Callable[[], float]:
    """A function that says how many seconds a call of ``run(*inputs)`` takes."""

    def seconds(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = run(*inputs)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    seconds(1)
    # 50 ms of calls in a row hide the cost of a launch and of waiting for it.
    calls = max(1, min(500, int(0.05 / seconds(3))))
    return partial(seconds, calls)


def measure(
    name: str, seq_len: int, heads: int, differentiate: bool, head_dim: int = 128
) -> dict:
    """One line of the table: milliseconds by contender, or why there are none."""
    spec, options = TIMED[name]
    inputs = arrays(1, seq_len, (heads, heads), head_dim, "bfloat16")
    wrap = with_gradient if differentiate else forward_only
    runs, result = {}, {}
    for who, attend in contenders(options, spec, heads * seq_len**2 * 4).items():
        if isinstance(attend, str):
            result[who] = attend
            continue
        run = wrap(attend)
        try:
            jax.block_until_ready(run(*inputs))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            result[who] = str(error).splitlines()[0][:200]
        else:
            runs[who] = run
    sides = {who: several(run, inputs) for who, run in runs.items()}
    result |= medians(sides, rounds=11)
    pairs = sa.plan(spec, seq_len).num_pairs
    flops = pairs * heads * head_dim * 4 * (3.5 if differentiate else 1)
    tflops = flops / result["sadsl"] / 1e9 if "sadsl" in runs else None
    step = "forward+backward" if differentiate else "forward"
    return {
        "map": name, "step": step, "seq_len": seq_len, "heads": heads,
        "head_dim": head_dim, "tflops": tflops, "ms": result,
    }  # fmt: skip


def cells(row: dict) -> list[str]:
    """A measured line as text: milliseconds, and how many times sadsl is faster."""
    ours = row["ms"]["sadsl"]
    line = [row["map"], row["step"], str(row["seq_len"]), str(row["heads"])]
    line.append(f"{ours:.3f}" if isinstance(ours, float) else "failed")
    line.append(f"{row['tflops']:.0f}" if row["tflops"] else "-")
    for who in ("jax cudnn", "jax xla"):
        theirs = row["ms"][who]
        both = isinstance(theirs, float) and isinstance(ours, float)
        line.append(f"{theirs:.3f}" if isinstance(theirs, float) else "-")
        line.append(f"{theirs / ours:.2f}x" if both else "-")
    return line


def gpu() -> str:
    """The GPU and the versions that the numbers were measured on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    driver = found.stdout.split("\n")[0]
    device = jax.devices()[0].device_kind
    return f"{device}, driver {driver}, {machine('jax', 'jaxlib')}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768]
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--interpret", action="store_true", help="check on a CPU")
    return parser.parse_args()


def main() -> int:
    """Checks, then times; 1 if a result is wrong, 2 without a GPU."""
    options = parse()
    if options.interpret:
        _, right = check(interpret=True)
        return 0 if right else 1
    if jax.default_backend() != "gpu":
        print(
            f"no GPU: jax runs on {jax.default_backend()!r} here. Install "
            '`pip install "jax[cuda13]"` on a machine with an NVIDIA GPU, or pass '
            "--interpret to check the kernels, without timing, on this one.",
            file=sys.stderr,
        )
        return 2
    checked, right = check(interpret=False)
    head = ["map", "step", "n", "heads", "sadsl ms", "TFLOP/s", "cudnn ms", "vs cudnn"]
    head += ["xla ms", "vs xla"]
    timed = [
        measure(name, seq_len, heads, differentiate)
        for name in TIMED
        for differentiate in (False, True)
        for heads in options.heads
        for seq_len in options.lengths
    ]
    print(table(head, [cells(row) for row in timed]))
    for who, why in {
        (who, text)
        for row in timed
        for who, text in row["ms"].items()
        if isinstance(text, str)
    }:
        print(f"{who} not run: {why}")
    print(gpu())
    if options.out:
        report = {"machine": gpu(), "checked": checked, "timed": timed}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
