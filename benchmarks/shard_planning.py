"""Planning time of shards: 16,777,216 tokens over 512 devices.

    python benchmarks/shard_planning.py [--maps NAME ...] > results/shard_planning.txt

CPU time on one core, without any cache, of what a sharded call plans while it is
traced: how keys travel between all shards, with equal shares of the work, and then the
plans of the calls of one shard, in blocks of 512 x 512, by queries and by keys. A plan
holds the blocks that some shard visits. The bar is one second.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from pods import DIM, HEADS, MAPS
from timing import machine, table

import sadsl as sa
from lowering import ir, pipeline, planning
from lowering.partition.balance import balance
from lowering.partition.exchange import exchange
from lowering.partition.shards import Shards
from lowering.problem import Problem
from sadsl.run import traced_offset
from sadsl.sharding.over_keys import AT_QUERY, AT_SLOTS, span_places
from sadsl.sharding.plan import shard_plan
from sadsl.terms.mixtures import Mixture, members_of
from sadsl.terms.moved import PairPlaces
from sadsl.terms.softmax import Softmax
from sadsl.terms.summaries import Summaries
from sadsl.text.specs import any_term

N, SHARDS, BLOCK, ROUNDS = 1 << 24, 512, 512, 3
BAR_MS = 1000.0


class OwnCall(NamedTuple):
    """A call of one shard: its map in indices of its arrays, and their lengths."""

    node: ir.Pred
    q_seq_len: int
    kv_seq_len: int


def softmaxes(term: Any) -> Iterator[Any]:
    """The parts of a spec that have plans."""
    if isinstance(term, Mixture):
        for member in members_of(term, Problem(N, N, HEADS)):
            yield from softmaxes(any_term(member.term))
    elif isinstance(term, Softmax | Summaries):
        yield term


def calls(term: Any, shards: Shards) -> Iterator[OwnCall]:
    """The calls of one shard for a part."""
    q = shards.q_size
    if isinstance(term, Summaries):
        size, partition = shards.kv_size, term.partition
        yield OwnCall(partition.members(size).node, partition.num_regions(size), size)
        seen = traced_offset.moved_map(partition.seen(N), {})
        yield OwnCall(seen.node, q, partition.num_regions(N))
        return
    (part,) = shard_plan(term, N, SHARDS, num_heads=HEADS, head_dim=DIM).parts
    assert part.route is not None
    found, lengths = part.route.parts, {"length": N}
    if part.route.way == "ring":
        # The keys of one shard at a time, with queries where they were moved.
        places = replace(AT_SLOTS, **lengths)
        if part.route.balance is not None:
            places = replace(places, q=AT_QUERY)
        yield OwnCall(moved(term, places), q, shards.kv_size)
        return
    if part.route.way == "gather":
        yield OwnCall(moved(term, PairPlaces(**lengths)), q, N)
        return
    kv = shards.kv_size + (found.before + found.after) * shards.granule
    yield OwnCall(moved(term, replace(span_places(shards, found), **lengths)), q, kv)
    others = len(found.shared) + sum(send.size for send in found.sends)
    if others:
        at = replace(AT_SLOTS, **lengths)
        yield OwnCall(moved(term, at), q, others * shards.granule)


def moved(term: Softmax, at: PairPlaces) -> ir.Pred:
    """The map of a term at places."""
    return traced_offset.moved_map(term.map, {}, at).node


def forget() -> None:
    """Empties the caches of the compiler."""
    caches = pipeline.run, pipeline.block_mask, exchange, balance, planning.squares
    for cached in caches:
        cached.cache_clear()


def spent(spec: Any) -> tuple[float, float, int]:
    """CPU milliseconds of the routes and of the plans, and the runs of the plans."""
    forget()
    shards = Shards(SHARDS, N, N)
    begin = time.process_time()
    parts = list(softmaxes(any_term(spec)))
    shard_plan(spec, N, SHARDS, num_heads=HEADS, head_dim=DIM)
    middle = time.process_time()
    runs = 0
    for part in parts:
        for call in calls(part, shards):
            problem = Problem(call.q_seq_len, call.kv_seq_len, HEADS)
            stages = pipeline.run(call.node, problem)
            for by in ("q", "kv"):
                runs += len(pipeline.block_mask(stages, BLOCK, BLOCK, by).run_start)
    return 1e3 * (middle - begin), 1e3 * (time.process_time() - middle), runs


def row(name: str) -> list[str]:
    """The line of a map."""
    spec = MAPS[name]
    if name == "neighbourhood":
        # As wide as at a million tokens, and taller.
        spec = sa.Grid(row=1 << 14, column=1 << 10).neighborhood((13, 13))
    found = [spent(spec) for _ in range(ROUNDS)]
    exchanged, planned = (float(np.median([x[i] for x in found])) for i in (0, 1))
    total = exchanged + planned
    verdict = "meets" if total <= BAR_MS else "MISSES"
    return [
        name, f"{exchanged:,.1f}", f"{planned:,.1f}", f"{total:,.1f}",
        f"{found[0][2]:,}", f"{verdict} {BAR_MS:,.0f} ms",
    ]  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", nargs="+", default=list(MAPS), choices=list(MAPS))
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    head = ["map", "routes ms", "plan ms", "together ms", "runs", "bar"]
    rows = [row(name) for name in args.maps]
    print(machine("jax"))
    print(f"{N:,} tokens over {SHARDS} shards")
    print(table(head, rows))


if __name__ == "__main__":
    main()
