"""The cost of selections: their share of attention in time, FLOPs and memory.

    python benchmarks/selection.py [--length 32768] [--only moba]

Runs one layer at ``--length`` for each mechanism and prints:

- median milliseconds of the selection and of the whole call on this CPU;
- FLOPs of the matrix products of the selection and of the visited blocks, the same on
  every chip, and the share of the selection in the time of a chip's roofline;
- temporary memory of both at a quarter of the length and at all of it. It would grow
  16-fold if it held all pairs.

Content has topics that change every few hundred tokens, so that neighbours choose
alike. f32.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, stopwatch, table

import sadsl as sa
from lowering.cost.rooflines import PEAKS
from sadsl import catalog
from sadsl.selections import kmeans, lsh, topk

HEADS, HEAD_DIM, BLOCK = 2, 64, 128
CHIPS = ("tpu-v5e", "h100")


class Case(NamedTuple):
    """A mechanism, and the arrays that it reads besides q and k."""

    spec: sa.IndexMap
    operands: Mapping[str, Any] = {}


def cases(n: int) -> dict[str, Case]:
    """Mechanisms of every family, at about an eighth of the keys or less."""
    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((HEADS, 64, HEAD_DIM), np.float32)
    buckets = lsh(64)
    hashed = {
        name: rng.standard_normal((HEADS, 1, HEAD_DIM, 32), np.float32)
        for name in buckets.operands
    }
    return {
        "moba": Case(catalog.moba(4, chunk=512)),
        "nsa_topk": Case(catalog.nsa_topk(16)),
        "block_sparse": Case(catalog.block_sparse(64)),
        "top-k blocks": Case(sa.causal() & topk(16, block=128)),
        "minference": Case(catalog.minference(1000, 1024)),
        "anchor": Case(catalog.anchor_attention()),
        "kmeans argmax": Case(
            sa.causal() & kmeans(64, members="argmax"), {"centroids": centroids}
        ),
        "lsh": Case(sa.causal() & buckets, hashed),
    }  # fmt: skip


def content(n: int) -> tuple[jax.Array, ...]:
    """q, k and v whose topic changes every 256 tokens, among 64 topics."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((64, HEADS, HEAD_DIM), np.float32)
    topic = np.repeat(rng.integers(0, 64, -(-n // 256)), 256)[:n]

    def noisy() -> jax.Array:
        noise = rng.standard_normal((n, HEADS, HEAD_DIM), np.float32)
        return jnp.asarray(topics[topic] + 0.5 * noise)[None]

    return noisy(), noisy(), noisy()


def products(jaxpr: Any) -> tuple[float, float]:
    """FLOPs of the products of a program, and the bytes that they read and write."""
    flops, moved = 0.0, 0.0
    for eqn in jaxpr.eqns:
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "dot_general":
            ((contract, _), _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            out = eqn.outvars[0].aval
            flops += 2.0 * math.prod(out.shape) * math.prod(shape[i] for i in contract)
            both = (*eqn.invars, eqn.outvars[0])
            moved += sum(x.aval.size * x.aval.dtype.itemsize for x in both)
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                more = products(inner)
                flops, moved = flops + times * more[0], moved + times * more[1]
    return flops, moved


def calls(case: Case) -> dict[str, Callable[..., Any]]:
    """The selection alone, and the whole call."""
    return {
        "select": lambda q, k, v: sa.select(case.spec, q, k, operands=case.operands),
        "attend": lambda q, k, v: sa.attention(
            q, k, v, case.spec, operands=case.operands
        ),
    }


def memory(f: Callable[..., Any], n: int) -> int:
    """Temporary bytes of a compiled call."""
    shape = jax.ShapeDtypeStruct((1, n, HEADS, HEAD_DIM), jnp.float32)
    compiled = jax.jit(f).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def roofline_share(case: Case, inputs: tuple[jax.Array, ...], chip: str) -> float:
    """The share of the selection in the time at a chip's peaks."""
    q, k, v = inputs
    peak = PEAKS[chip]

    def seconds(flops: float, moved: float) -> float:
        return max(flops / peak.single, moved / peak.bandwidth)

    chosen = seconds(*products(jax.make_jaxpr(calls(case)["select"])(q, k, v).jaxpr))
    plan = sa.plan_for(case.spec, q, k, operands=case.operands)
    tiles = (plan.num_full + plan.num_partial) * HEADS / plan.mask.num_maps
    attended = seconds(
        tiles * 4 * BLOCK * BLOCK * HEAD_DIM, tiles * 2 * BLOCK * HEAD_DIM * 4
    )
    return chosen / (chosen + attended)


def row(name: str, n: int, rounds: int) -> list[str]:
    """One line of the table."""
    case, inputs = cases(n)[name], content(n)
    found = calls(case)
    sides = {x: stopwatch(jax.jit(f), *inputs) for x, f in found.items()}
    ms = medians(sides, rounds)
    plan = sa.plan_for(case.spec, *inputs[:2], operands=case.operands)
    causal = sa.plan(sa.causal(), n)
    tiles = (plan.num_full + plan.num_partial) / plan.mask.num_maps
    share = tiles / (causal.num_full + causal.num_partial)
    grown = [
        f"{memory(f, n // 4) / 2**20:,.0f} -> {memory(f, n) / 2**20:,.0f}"
        for f in found.values()
    ]
    chips = [f"{roofline_share(case, inputs, chip):.1%}" for chip in CHIPS]
    times = [f"{x:,.0f}" for x in ms.values()]
    of_time = f"{ms['select'] / ms['attend']:.1%}"
    return [name, f"{share:.1%}", *times, of_time, *chips, *grown]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    n = options.length
    print(machine("jax", "jaxlib"))
    print(f"n={n:,}, {HEADS} heads of {HEAD_DIM}, f32, causal; ms and MiB\n")
    names = [name for name in cases(n) if options.only in name]
    rows = [row(name, n, options.rounds) for name in names]
    head = ["", "blocks of causal", "select", "attend", "share"]
    head += [*CHIPS, "select MiB n/4 -> n", "attend MiB n/4 -> n"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
