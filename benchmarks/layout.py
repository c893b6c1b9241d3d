"""Blocks that another order of positions saves: before, after, and the lower bound.

    python benchmarks/layout.py [--block 128] [--times]

Covers the catalogue at its published sizes, then strides, dilations and neighbourhoods
of other sizes. Blocks are summed over heads. The bound is ``ceil(pairs / block**2)``:
the blocks that the attended pairs would fill. Milliseconds are CPU time, medians of 3
on one core with empty caches: of the plan in the given order, of the search for an
order, and of the plan in that order. ``--times`` instead runs the forward pass of the
shorter cases on this CPU (f32, head_dim 64, 1 head) in both orders.

No order comes near the bound of a small neighbourhood. With a window of 7 x 7, away
from the edges, 128 queries see at least ``(sqrt(128) + 6) ** 2``, some 300 different
keys, which is 3 blocks, while their pairs would fill 49 / 128 of one: at least 7.8
times the bound. A grid of tiles has 9 blocks, 23 times; the order found has 21 times.

Logsparse sees the distances 0 and 2^i, 17 in all at n = 65,536. Take 128 queries that
differ in 7 binary digits, as blocks of any order of binary digits do. A distance that
is one of these digits leads half of the queries to others of them; each of the other
nine leads to 128 new keys, and distance 0 to another 128. So away from the start a row
has at least 10 blocks, and its 17 x 128 pairs would fill 0.13 of one: 75 times the
bound, 71 with the start.

Heads with different maps in orders of their own count as "2 orders". BigBird and
Longformer are made of blocks of 64 and of windows of 513: with ``--block 64`` they
visit 1.00 and 1.37 times the bound, and Longformer with dilations 1.53 times.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from catalog_cases import CASES, Case
from planning import arranged, forget
from timing import machine, medians, stopwatch, table

import sadsl as sa
from lowering import pipeline
from lowering.facts.plan_counts import Plan
from pallas_kernels.block_mask import BlockMask

ROUNDS = 3
# Longer ones are not timed: in the given order some are as slow as dense attention.
LONGEST = 16_384
SQUARE, VIDEO = sa.Grid(h=64, w=64), sa.Grid(t=16, h=32, w=32)
# name, spec, length, block
OTHERS = [
    ("strided(16)", sa.strided(16), 65_536, 128),
    ("strided(100)", sa.strided(100), 51_200, 128),
    ("causal & strided(32)", sa.causal() & sa.strided(32), 65_536, 128),
    ("causal & strided(128)", sa.causal() & sa.strided(128), 65_536, 128),
    ("dilated(1023, 0, 16)", sa.dilated(1023, 0, 16), 65_536, 128),
    ("dilated(1024, 1024, 8)", sa.dilated(1024, 1024, 8), 65_536, 128),
    ("causal & strided(16)", sa.causal() & sa.strided(16), 16_384, 128),
    ("dilated(255, 0, 16)", sa.dilated(255, 0, 16), 16_384, 128),
    ("window(1023), for scale", sa.window(1023), 65_536, 128),
    ("64x64, 7", SQUARE.neighborhood(7), 4096, 16),
    ("64x64, 13", SQUARE.neighborhood(13), 4096, 16),
    ("64x64, 13", SQUARE.neighborhood(13), 4096, 32),
    ("64x64, 17", SQUARE.neighborhood(17), 4096, 64),
    ("64x64, 24 stride 8", SQUARE.neighborhood(24, stride=8), 4096, 64),
    ("64x64, 7 dilation 8", SQUARE.neighborhood(7, dilation=8), 4096, 64),
    ("64x64, 33", SQUARE.neighborhood(33), 4096, 128),
    ("256x256, 33", sa.Grid(h=256, w=256).neighborhood(33), 65_536, 128),
    ("16x32x32, 7", VIDEO.neighborhood(7), 16_384, 32),
    ("16x32x32, (8,16,16)", VIDEO.neighborhood((8, 16, 16)), 16_384, 64),
    ("16x32x32, 12 stride 4", VIDEO.neighborhood(12, stride=4), 16_384, 64),
    (
        "16x32x32, (6,12,12) stride (2,4,4)",
        VIDEO.neighborhood((6, 12, 12), stride=(2, 4, 4)),
        16_384,
        32,
    ),
]


def milliseconds(run: Callable[[], object], before: Callable[[], object]) -> float:
    """The median CPU time of some runs; ``before`` is called first and not timed."""
    spent = []
    for _ in range(ROUNDS):
        before()
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return 1e3 * statistics.median(spent)


def visited(mask: BlockMask) -> int:
    """Blocks over all heads."""
    weights = np.bincount(np.asarray(mask.map_of_head))
    return int(mask.visited_by_map() @ weights)


def bound(plan: Plan) -> int:
    """Blocks that the pairs of all heads would fill."""
    area = plan.mask.block_q * plan.mask.block_kv
    weights = np.bincount(np.asarray(plan.mask.map_of_head))
    pairs = sum(plan.pairs_of_map(m) * int(w) for m, w in enumerate(weights))
    return -(-pairs // area)


def measure(case: Case, block: int) -> list[str]:
    """One line of the table."""
    lower = partial(
        pipeline.run, case.spec.node, pipeline.Problem(case.n, case.n, case.num_heads)
    )

    def search() -> list[pipeline.Stages]:
        return arranged(case, lower(), block)

    given_ms = milliseconds(
        lambda: pipeline.block_mask(lower(), block, block), lambda: (forget(), lower())
    )
    search_ms = milliseconds(search, lambda: (forget(), lower()))
    parts = search()
    plan_ms = milliseconds(
        lambda: [pipeline.block_mask(part, block, block) for part in parts],
        pipeline.block_mask.cache_clear,
    )
    sizes = {"block_q": block, "block_kv": block, "num_heads": case.num_heads}
    given = sa.plan(case.spec, case.n, **sizes, relayout=False)
    before, least = visited(given.mask), bound(given)
    after = sum(visited(pipeline.block_mask(part, block, block)) for part in parts)
    new = sum(part.layouts is not None for part in parts)
    order = f"{len(parts)} orders" if len(parts) > 1 else ("as given", "new")[new]
    return [
        case.name, f"{case.n:,}", f"{block}", f"{before:,}", f"{after:,}",
        f"{before / after:.2f}", f"{least:,}", f"{after / least:.2f}", order,
        f"{given_ms:.0f}", f"{search_ms:.0f}", f"{plan_ms:.0f}",
    ]  # fmt: skip


def forward_times(case: Case, block: int) -> list[str]:
    """Milliseconds of the forward pass in the given and in the new order."""
    shape = (1, case.n, case.num_heads, 64)
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape), jnp.float32)

    def side(relayout: bool | None) -> Callable[[], float]:
        config = sa.KernelConfig(block_q=block, block_kv=block, relayout=relayout)
        call = partial(sa.attention, spec=case.spec, impl="xla", config=config)
        return stopwatch(jax.jit(call), q, k, v)

    found = medians({"given": side(False), "new": side(None)}, ROUNDS)
    ratio = f"{found['given'] / found['new']:.2f}"
    given, new = (f"{found[name]:.1f}" for name in ("given", "new"))
    return [case.name, f"{block}", given, new, ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", type=int, default=128, help="of the catalogue")
    parser.add_argument("--times", action="store_true", help="run the forward pass")
    args = parser.parse_args()
    others = [(Case(name, spec, n), block) for name, spec, n, block in OTHERS]
    print(machine("jax", "numpy"))
    if args.times:
        rows = [forward_times(*other) for other in others if other[0].n <= LONGEST]
        print(table(["map", "block", "given ms", "new ms", "ratio"], rows))
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    rows = [measure(case, args.block) for case in CASES]
    rows += [measure(*other) for other in others]
    head = ["map", "n", "block", "before", "after", "gain", "bound", "/ bound", "order",
            "plan ms", "search ms", "new plan ms"]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
