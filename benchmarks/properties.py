"""Time of ``sa.properties`` at 65,536 positions, and the hops that it finds.

    python benchmarks/properties.py [--catalogue]

One run each on one core with empty caches, after a run that warms up. ``--catalogue``
adds every published mechanism at its own size, but for the arbitrary permutation of
``residue_major``, whose live ranges have to be searched block by block for minutes.
"""

import argparse
import os
import time

from catalog_cases import CASES, Case
from layout import forget
from timing import machine, table

import sadsl as sa

N = 65_536
SPECS = [
    "causal()",
    "causal() & (window(511) | sinks(4))",
    "window(512)",
    "causal() & strided(64)",
    "causal() & (strided(256) | window(255))",
    "dilated(8, 0, 4)",
    "causal() & blocks(256)",
    "Grid(h=256, w=256).neighborhood(7)",
]


def measure(case: Case) -> list[str]:
    """One line of the table."""
    forget()
    start = time.perf_counter()
    found = sa.properties(case.spec, case.n, num_heads=case.num_heads)
    seconds = time.perf_counter() - start
    causal = "yes" if found.causal else "no"
    size = "-" if found.cache is None else f"{found.cache.size:,}"
    rows = dict(found.rows())
    hops = rows["hops to all visible"]
    return [case.name, f"{case.n:,}", f"{seconds:.2f}", causal, hops, size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalogue", action="store_true")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    cases = [Case(text, sa.parse(text), N) for text in SPECS]
    chosen = [case for case in CASES if case.name != "residue_major"]
    cases += chosen if args.catalogue else chosen[:1]
    sa.properties("causal() & window(9)", 256)
    print(machine("numpy"))
    head = ["map", "n", "seconds", "causal", "hops", "cache"]
    print(table(head, [measure(case) for case in cases]))


if __name__ == "__main__":
    main()
