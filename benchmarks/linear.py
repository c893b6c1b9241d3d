"""Linear attention: how its time grows, where it is fastest, and its code for TPUs.

    python benchmarks/linear.py [--longest 131072] [--dense 16384] > results/linear.txt

On a CPU: median milliseconds of ``linear()`` by length, forward and with backward, f32,
batch 1, and the exponent of a least-squares line through the logarithms. Beside it:
dense causal attention and ``causal() & window(256)`` by the same library, and the
length where the lines through the logarithms of two of them cross. For TPUs, none of
which is needed: bundles of the kernels of one call, matrix instructions and spills.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

DUMP = tempfile.mkdtemp(prefix="linear_bundles_")
# Read once, when libtpu is loaded.
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true "
    + os.environ.get("LIBTPU_INIT_ARGS", "")
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import machine, medians, stopwatch, table  # noqa: E402

import sadsl as sa  # noqa: E402
from lowering.cost import targets  # noqa: E402
from pallas_kernels import linear  # noqa: E402

HEADS, HEAD_DIM = 4, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
# The exponent of linear attention is fitted to lengths from here on.
FITTED_FROM = 4096
SPECS = {
    "linear": sa.linear(),
    "window": sa.causal() & sa.window(256),
    "dense": sa.causal(),
}
CHIPS = "tpu-v5e", "tpu-v6e"
KERNELS = "forward", "states", "backward"


def arrays(n: int) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent."""
    rng = np.random.default_rng(0)
    shape = 1, n, HEADS, HEAD_DIM
    made = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(4))
    return tuple(made)


def with_backward(f: Callable, q: Any, k: Any, v: Any, do: Any) -> Any:
    """The output, and the gradients of q, k and v."""
    out, pull = jax.vjp(f, q, k, v)
    return out, pull(do)


def sides(n: int, names: list[str]) -> dict[str, Callable[[], float]]:
    """Stopwatches by name: each kind forward, and forward with backward."""
    q, k, v, do = arrays(n)
    found = {}
    for name in names:
        f = partial(sa.attention, spec=SPECS[name], impl="xla")
        found[name] = stopwatch(jax.jit(f), q, k, v)
        both = jax.jit(partial(with_backward, f))
        found[f"{name}, with backward"] = stopwatch(both, q, k, v, do)
    return found


def line(times: dict[int, float]) -> tuple[float, float]:
    """Slope and start of the least-squares line of log time over log length."""
    used = {n: ms for n, ms in times.items() if n >= FITTED_FROM} or times
    used = used if len(used) > 1 else times
    slope, start = np.polyfit(np.log(list(used)), np.log(list(used.values())), 1)
    return float(slope), float(start)


def crossing(a: dict[int, float], b: dict[int, float]) -> str:
    """The length from which ``a`` is faster than ``b``, measured or by the lines."""
    both = sorted(set(a) & set(b))
    for left, right in pairwise(both):
        if a[left] >= b[left] and a[right] < b[right]:
            gaps = [np.log(a[n] / b[n]) for n in (left, right)]
            share = gaps[0] / (gaps[0] - gaps[1])
            return f"about {left * (right / left) ** share:,.0f}"
    if a[both[0]] < b[both[0]]:
        return f"below {both[0]:,}, the shortest"
    (slope_a, start_a), (slope_b, start_b) = line(a), line(b)
    if slope_b - slope_a < 0.05:
        return "nowhere: both grow alike"
    at = np.exp((start_a - start_b) / (slope_b - slope_a))
    return f"beyond {both[-1]:,}, at {at:,.0f} by the lines"


def growth(longest: int, longest_dense: int, rounds: int) -> str:
    """The table of times, the ratios and the crossings."""
    lengths = [n for n in LENGTHS if n <= longest]
    found: dict[str, dict[int, float]] = {}
    for n in lengths:
        names = [x for x in SPECS if x != "dense" or n <= longest_dense]
        for name, ms in medians(sides(n, names), rounds).items():
            found.setdefault(name, {})[n] = ms
    rows = [
        [
            name,
            *(f"{ms[n]:.1f}" if n in ms else "" for n in lengths),
            f"{line(ms)[0]:.2f}",
        ]
        for name, ms in found.items()
    ]
    lines = [
        f"{HEADS} heads of {HEAD_DIM}, milliseconds; exponents from {FITTED_FROM:,} on",
        "",
        table(["", *(f"{n:,}" for n in lengths), "exponent"], rows),
        "",
    ]
    for kind in ("", ", with backward"):
        mine = found[f"linear{kind}"]
        for other in ("dense", "window"):
            theirs = found[f"{other}{kind}"]
            at = max(set(mine) & set(theirs))
            lines.append(
                f"linear against {other}{kind}: {theirs[at] / mine[at]:.1f} times as "
                f"fast at {at:,}; the lengths cross: {crossing(mine, theirs)}"
            )
    return "\n".join(lines)


# --- the code of the TPU kernels ---


def program(n: int, dim: int, chunk: int, decay: bool) -> tuple[Callable, tuple]:
    """Value and gradient of one call in bf16, and the shapes that it takes."""
    shape, dtype = (1, HEADS, n, dim), jnp.bfloat16
    q = jax.ShapeDtypeStruct((1, HEADS, 1, n, dim), dtype)
    k = jax.ShapeDtypeStruct(shape, dtype)
    g = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    call = linear.LinearCall(linear.scalar(1e-10), chunk)

    def loss(arrays: tuple) -> jax.Array:
        q, k, v, g = arrays
        inputs = linear.LinearInputs(q, k, v, g if decay else None)
        out = linear.attend(inputs, call, impl="tpu").out
        return jnp.sum(out.astype(jnp.float32))

    return jax.value_and_grad(loss), ((q, k, k, g),)


def bundles(name: str) -> tuple[int, int, int]:
    """Bundles, matrix instructions and spills of the kernel compiled last."""
    pattern = f"*sadsl_linear_{name}*final_bundles.txt"
    files = [x for x in Path(DUMP).glob(pattern) if "schedule-analysis" not in x.name]
    text = max(files, key=lambda x: x.stat().st_mtime_ns).read_text()
    count = len(re.findall(r"^\s*0x[0-9a-f]+", text, re.MULTILINE))
    return count, len(re.findall(r"= vmatmul", text)), text.count("spill")


def code(chunks: tuple[int, ...] = (128, 256, 512)) -> str:
    """Bundles of the kernels, per chunk of one head, and what they hold."""
    rows = []
    for chip in CHIPS:
        for dim in (64, 128):
            for decay in (False, True):
                for chunk in chunks:
                    targets.compile_for(*program(2048, dim, chunk, decay), chip)
                    found = [bundles(name) for name in KERNELS]
                    kind = "decay" if decay else "none"
                    cells = [" / ".join(map(str, x)) for x in found]
                    rows.append(
                        [chip, str(dim), kind, str(chunk), *cells,
                         f"{found[0][0] / chunk:.1f}",
                         f"{(found[1][0] + found[2][0]) / chunk:.1f}"]
                    )  # fmt: skip
    head = ["chip", "head_dim", "decay", "chunk", *KERNELS, "a token", "backward"]
    note = (
        "TPU kernels in bf16, with a normaliser: bundles / matrix multiplications / "
        "spills of a kernel, and bundles a token of one head"
    )
    return f"{note}\n\n{table(head, rows)}"


def main() -> None:
    """Measures, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--dense", type=int, default=16384, help="longest dense length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("growth", "code"))
    args = parser.parse_args()
    parts = [machine("jax", "sadsl")]
    if args.only != "code":
        parts.append(growth(args.longest, args.dense, args.rounds))
    if args.only != "growth":
        parts.append(code())
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
