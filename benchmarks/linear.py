"""Linear attention: how its time and memory grow, and where it is fastest.

    python benchmarks/linear.py [--longest 131072] [--dense 16384] > results/linear.txt

On a CPU: median milliseconds by length, forward and with backward, f32, batch 1, and
the exponent of a least-squares line through the logarithms. "linear" is ``linear()``,
"channel" has log-decays by key channel, "delta" is ``delta`` with a log-decay by head,
"delta, channel" by channel. Beside them: dense causal attention and ``causal() &
window(256)`` by the same library, a loop over tokens of the same delta rule, and the
length where the lines through the logarithms of two of them cross. Memory is what XLA
reserves for temporaries of value and gradient, per token and head.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, stopwatch, table

import sadsl as sa

HEADS, HEAD_DIM = 4, 64
LENGTHS = (256, 1024, 4096, 8192, 16384, 32768, 65536, 131072)
# Exponents are fitted to lengths from here on.
FITTED_FROM = 4096
# The loop over tokens keeps a state for each token in its backward pass.
LONGEST_LOOP = 4096
SPECS = {
    "linear": sa.linear(),
    "channel": sa.linear("identity", "channel", by="channel", normalise=False),
    "delta": sa.delta("beta", "head"),
    "delta, channel": sa.delta("beta", "channel", by="channel"),
    "window": sa.causal() & sa.window(256),
    "dense": sa.causal(),
    "loop": sa.delta("beta", "head"),
}
RECURRENT = "linear", "channel", "delta", "delta, channel"


class Arrays(NamedTuple):
    """q, k, v, the cotangent, and the operands of the specs."""

    q: Any
    k: Any
    v: Any
    do: Any
    operands: dict[str, Any]


def arrays(n: int) -> Arrays:
    """Normal queries, keys and values; weak log-decays; betas of a sigmoid."""
    rng = np.random.default_rng(0)
    shape = 1, n, HEADS, HEAD_DIM
    made = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(4))
    gates = jnp.asarray(rng.standard_normal(shape, np.float32))
    decays = jax.nn.log_sigmoid(gates + 3)
    operands = {
        "channel": decays,
        "head": decays[..., 0],
        "beta": jax.nn.sigmoid(gates[..., 1]),
    }
    return Arrays(*made, operands)


def program(name: str, backward: bool) -> Callable[[Arrays], Any]:
    """A call, perhaps with the gradients of all arrays that it reads."""
    spec = SPECS[name]
    impl = "reference" if name == "loop" else "xla"

    def forward(q: Any, k: Any, v: Any, operands: dict[str, Any]) -> Any:
        return sa.attention(q, k, v, spec, operands=operands, impl=impl)

    def run(given: Arrays) -> Any:
        reads = getattr(spec, "operands", ())
        read = {n: x for n, x in given.operands.items() if n in reads}
        inputs = given.q, given.k, given.v, read
        if not backward:
            return forward(*inputs)
        out, pull = jax.vjp(forward, *inputs)
        return out, pull(given.do)

    return jax.jit(run)


def sides(n: int, names: list[str]) -> dict[str, Callable[[], float]]:
    """Stopwatches by name: each kind forward, and forward with backward."""
    given = arrays(n)
    return {
        f"{name}{', with backward' if backward else ''}": stopwatch(
            program(name, backward), given
        )
        for name in names
        for backward in (False, True)
    }


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
    most = {"dense": longest_dense, "loop": LONGEST_LOOP}
    found: dict[str, dict[int, float]] = {}
    for n in lengths:
        names = [x for x in SPECS if n <= most.get(x, n)]
        for name, ms in medians(sides(n, names), rounds).items():
            found.setdefault(name, {})[n] = ms
    rows = [
        [
            name,
            *(f"{ms[n]:.1f}" if n in ms else "" for n in lengths),
            f"{line(ms)[0]:.2f}" if len(ms) > 2 else "",
        ]
        for name, ms in found.items()
    ]
    lines = [
        f"{HEADS} heads of {HEAD_DIM}, milliseconds; exponents from {FITTED_FROM:,} on",
        "",
        table(["", *(f"{n:,}" for n in lengths), "exponent"], rows),
        "",
    ]
    for name in RECURRENT:
        for kind in ("", ", with backward"):
            mine = found[f"{name}{kind}"]
            for other in ("dense", "window", *(["loop"] if name == "delta" else [])):
                theirs = found[f"{other}{kind}"]
                at = max(set(mine) & set(theirs))
                lines.append(
                    f"{name} against {other}{kind}: {theirs[at] / mine[at]:.1f} times "
                    f"as fast at {at:,}; the lengths cross: {crossing(mine, theirs)}"
                )
    return "\n".join(lines)


def memory(n: int = 4096) -> str:
    """Bytes of temporaries of value and gradient, per token and head."""
    given = arrays(n)
    rows = []
    for name in SPECS:
        compiled = program(name, True).lower(given).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        rows.append([name, f"{size / n / HEADS:,.0f}"])
    head = ["", f"temporary bytes a token and head, with backward, {n:,} tokens"]
    return table(head, rows)


def main() -> None:
    """Measures, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--dense", type=int, default=16384, help="longest dense length")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    parts = machine("jax", "sadsl"), growth(args.longest, args.dense, args.rounds)
    print("\n\n".join([*parts, memory()]))


if __name__ == "__main__":
    main()
