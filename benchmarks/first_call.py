"""The time of a first call: tracing, lowering and compiling, for ten specs on a CPU.

    python benchmarks/first_call.py

Each spec runs in a child process of its own, without a cache of compiled programs:
``sa.attention`` and its gradient with respect to q, k and v, 4,096 positions, 8 heads
on 2 key heads, head_dim 64, float32. ``jax.nn.dot_product_attention`` stands beside
them. Importing and starting JAX are not counted. The sizes of the programs do not
depend on the machine: equations of the jaxpr, and instructions and loops of the
compiled HLO. ``--only causal window`` takes some of the specs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from timing import machine, pin, table

import sadsl as sa
from sadsl.terms.base import Spec

SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 4096, 8, 2, 64
CAUSAL = sa.causal()
SPECS: dict[str, Spec] = {
    "causal": CAUSAL,
    "window": CAUSAL & sa.window(511),
    "window, sinks": CAUSAL & (sa.window(511) | sa.sinks(4)),
    "documents": CAUSAL & sa.segments(),
    "blocks, topk": CAUSAL & sa.topk(8, block=64),
    "ALiBi": sa.softmax(CAUSAL, bias=sa.alibi()),
    "linear": sa.linear(decay=0.98),
    "delta": sa.delta(),
    "mixture": sa.average(CAUSAL & sa.window(511), CAUSAL & sa.strided(64)),
    "summaries": sa.joint(CAUSAL & sa.blocks(128), sa.summaries(sa.spans(128))),
}
DENSE = "jax.nn causal"
STAGES = "trace", "lower", "compile"
SIZES = "equations", "instructions", "loops"


def given(name: str) -> dict[str, Any]:
    """The shapes of the operands of a spec."""
    if name == "documents":
        ids = jax.ShapeDtypeStruct((1, SEQ_LEN), jnp.int32)
        return {"q_segment_ids": ids, "kv_segment_ids": ids}
    if name == "delta":
        return {"beta": jax.ShapeDtypeStruct((1, SEQ_LEN, HEADS), jnp.float32)}
    return {}


def calls(name: str) -> dict[str, Callable]:
    """The functions of q, k, v and operands to compile, by pass."""

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, given: dict) -> jax.Array:
        if name == DENSE:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return sa.attention(q, k, v, SPECS[name], operands=given)

    def loss(*args: Any) -> jax.Array:
        return forward(*args).sum()

    return {"forward": forward, "gradient": jax.grad(loss, argnums=(0, 1, 2))}


def equations(jaxpr: Any) -> int:
    """The equations of a jaxpr, with those of the jaxprs inside it."""
    inner = jaxprs_in_params
    return sum(1 + sum(map(equations, inner(e.params))) for e in jaxpr.eqns)


def measured(name: str, direction: str) -> dict[str, Any]:
    """Seconds of each stage of one call, and the sizes of its programs."""
    jax.block_until_ready(jnp.zeros(8) + 1)
    shapes = [
        jax.ShapeDtypeStruct((1, SEQ_LEN, heads, HEAD_DIM), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    times = [time.perf_counter()]
    traced = jax.jit(calls(name)[direction]).trace(*shapes, given(name))
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    hlo = compiled.as_text()
    steps = pairwise(times)
    return {
        "spec": name,
        "pass": direction,
        **dict(zip(STAGES, (b - a for a, b in steps), strict=True)),
        "equations": equations(traced.jaxpr.jaxpr),
        "instructions": len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", hlo, re.M)),
        "loops": len(re.findall(r" while\(", hlo)),
    }


def in_child(name: str, direction: str, threads: int) -> dict[str, Any]:
    """``measured`` in a fresh process, which finds no cache of compiled programs."""
    command = [sys.executable, __file__, "--threads", str(threads)]
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    found = subprocess.run(
        [*command, "--measure", name, direction],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(found.stdout)


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    seconds = [row[stage] for stage in STAGES]
    cells = [f"{x:.2f}" for x in (*seconds, sum(seconds))]
    return [row["spec"], row["pass"], *cells, *(str(row[size]) for size in SIZES)]


def main() -> None:
    """Prints the table and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many")
    parser.add_argument("--only", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pin(options.threads)
    if options.measure is not None:
        print(json.dumps(measured(*options.measure)))
        return
    print(machine("jax"), flush=True)
    rows = []
    for name in (DENSE, *options.only):
        for direction in ("forward", "gradient"):
            tries = [
                in_child(name, direction, options.threads)
                for _ in range(options.rounds)
            ]
            rows.append(min(tries, key=lambda row: sum(row[s] for s in STAGES)))
            print("  ".join(line(rows[-1])), flush=True)
    head = ["spec", "pass", *(f"{stage}, s" for stage in STAGES), "total, s", *SIZES]
    print("\n" + table(head, [line(row) for row in rows]))
    if options.out is not None:
        report = {"machine": machine("jax"), "rows": rows}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
