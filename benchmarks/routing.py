"""Routing attention on a CPU: does its cost grow as the length to the power 1.5?

    python benchmarks/routing.py [--longest 32768]

Compares the averaged term with dense causal attention by the same kernels. The term has
about ``sqrt(n)`` clusters (a power of two) of ``n / clusters`` positions each, and its
time includes the choice of members. Prints median milliseconds (f32, batch 1), and the
exponent of a least-squares line through the logarithms. Dense runs up to ``--dense``.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, stopwatch, table

import sadsl as sa
from sadsl.selections import kmeans
from sadsl.selections.kmeans import normalized

HEADS, HEAD_DIM = 2, 64
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def clusters_of(n: int) -> int:
    """The largest power of two up to the root of the length."""
    return 1 << (n.bit_length() - 1) // 2


def arrays(n: int) -> tuple[jax.Array, ...]:
    """Shared q and k, v, the cotangent, and centroids."""
    rng = np.random.default_rng(0)
    shape = 1, n, HEADS, HEAD_DIM
    q, v, do = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3))
    sizes = HEADS, clusters_of(n), HEAD_DIM
    centroids = jnp.asarray(rng.standard_normal(sizes, np.float32))
    return normalized(q, "layer"), v, do, normalized(centroids, "layer")


def routed(n: int) -> Callable[..., Any]:
    """The averaged term over clusters that divide ``n`` positions among them."""
    spec = sa.scatter_mean(sa.causal() & kmeans(clusters_of(n)), sm_scale=1.0)
    return lambda q, v, c: sa.attention(q, q, v, spec, operands={"centroids": c})


def dense(n: int) -> Callable[..., Any]:
    """Causal attention."""
    del n
    return lambda q, v, c: sa.attention(q, q, v, sa.causal(), sm_scale=1.0)


def with_backward(f: Callable, q: Any, v: Any, centroids: Any, do: Any) -> Any:
    """The output, and the gradients of q (as queries and keys) and v."""
    out, pull = jax.vjp(lambda q, v: f(q, v, centroids), q, v)
    return out, pull(do)


def sides(n: int, with_dense: bool) -> dict[str, Callable[[], float]]:
    """Stopwatches by name: each kind forward, and forward with backward."""
    q, v, do, centroids = arrays(n)
    kinds = {"routing": routed(n)} | ({"dense": dense(n)} if with_dense else {})
    found = {}
    for name, f in kinds.items():
        both = jax.jit(partial(with_backward, f))
        found[name] = stopwatch(jax.jit(f), q, v, centroids)
        found[f"{name}, with backward"] = stopwatch(both, q, v, centroids, do)
    return found


def exponent(lengths: list[int], times: list[float]) -> float:
    """The slope of log time over log length."""
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--dense", type=int, default=16384, help="longest dense length")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lengths = [n for n in LENGTHS if n <= args.longest]
    found: dict[str, dict[int, float]] = {}
    for n in lengths:
        for name, ms in medians(sides(n, n <= args.dense), args.rounds).items():
            found.setdefault(name, {})[n] = ms
    sizes = [f"{n} ({clusters_of(n)} x {n // clusters_of(n)})" for n in lengths]
    rows = [
        [name, *(f"{ms[n]:.1f}" if n in ms else "" for n in lengths),
         f"{exponent(list(ms), list(ms.values())):.2f}"]
        for name, ms in found.items()
    ]  # fmt: skip
    print(machine("jax", "sadsl"))
    print(f"{HEADS} heads of {HEAD_DIM}, milliseconds; length (clusters x window)\n")
    print(table(["", *sizes, "exponent"], rows))


if __name__ == "__main__":
    main()
