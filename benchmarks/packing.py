"""Packed documents and prefixes on a CPU: time falls with the visible pairs.

    python benchmarks/packing.py [--length 16384]

One case has equal documents, whose ids are known only at run time; one has documents of
random lengths. One compiled program serves them all. Beside them: the same pairs as a
static map, and dense causal attention. Prints median milliseconds (f32, batch 1, sides
alternating) and the blocks of 128 x 128 that each head visits.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, stopwatch, table

import sadsl as sa

HEADS, HEAD_DIM = 4, 64
PACKED = sa.causal() & sa.segments()
NAMES = ("q_segment_ids", "kv_segment_ids")


def arrays(n: int) -> tuple[jax.Array, ...]:
    """Random q, k and v."""
    rng = np.random.default_rng(0)
    shape = 1, n, HEADS, HEAD_DIM
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3))


def equal(n: int, length: int) -> np.ndarray:
    """Document ids of equal documents."""
    return (np.arange(n) // length).astype(np.int32)


def ragged(n: int, mean: int) -> np.ndarray:
    """Document ids of documents whose lengths are random, ``mean`` on average."""
    ends = np.random.default_rng(1).random(n) < 1 / mean
    return np.cumsum(ends).astype(np.int32)


def visited(n: int, ids: np.ndarray) -> int:
    """Blocks that the run-time plan visits for one head."""
    q = jnp.zeros((1, n, HEADS, HEAD_DIM))
    plan = sa.plan_for(PACKED, q, q, operands=dict.fromkeys(NAMES, ids))
    return plan.num_full + plan.num_partial


def forward(spec: sa.IndexMap) -> Callable[..., jax.Array]:
    """Attention over a spec that reads ids, or not."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        named = dict.fromkeys(NAMES, ids[0]) if ids else {}
        return sa.attention(q, k, v, spec, **named)

    return call


def backward(spec: sa.IndexMap) -> Callable[..., tuple[jax.Array, ...]]:
    """Values and gradients."""
    call = forward(spec)
    return jax.grad(lambda *x: jnp.sum(call(*x)), argnums=(0, 1, 2))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    n = options.length
    print(machine("jax", "jaxlib"))
    print(f"n={n:,}, {HEADS} heads of {HEAD_DIM}, f32; ms, and blocks a head\n")
    inputs = arrays(n)
    both = jax.jit(forward(PACKED)), jax.jit(backward(PACKED))
    dense = jax.jit(forward(sa.causal())), jax.jit(backward(sa.causal()))
    lengths = [n // 2**i for i in range(7)]
    rows = []
    for length in lengths:
        static = sa.causal() & sa.blocks(length)
        for kind, ids in (("equal", equal(n, length)), ("ragged", ragged(n, length))):
            given = (*inputs, jnp.asarray(ids)[None])
            sides = {
                "forward": stopwatch(both[0], *given),
                "fwd+bwd": stopwatch(both[1], *given),
            }
            if kind == "equal":
                sides["static"] = stopwatch(jax.jit(forward(static)), *inputs)
            found = medians(sides, options.rounds)
            ms = [f"{found[x]:,.0f}" if x in found else "" for x in (*sides, "static")]
            rows.append([f"{kind} {length:,}", f"{visited(n, ids):,}", *ms[:3]])
    whole = medians(
        {
            "forward": stopwatch(dense[0], *inputs),
            "fwd+bwd": stopwatch(dense[1], *inputs),
        },
        options.rounds,
    )
    blocks = sa.plan(sa.causal(), n)
    count = blocks.num_full + blocks.num_partial
    rows.append(["causal()", f"{count:,}", *(f"{x:,.0f}" for x in whole.values()), ""])
    head = ["documents of", "blocks", "forward", "fwd+bwd", "static forward"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
