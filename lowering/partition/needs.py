"""Finds the keys that each shard of queries needs, by planning with shards as rows.

A row of the plan is a shard and a column is a granule of keys. So the cost is that of a
plan with one row for each shard, whatever the shard holds.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lowering import ir
from lowering.expr.simplify import simplify
from lowering.partition.shards import Shards
from lowering.planning import BlockSizes, plan


class Needs(NamedTuple):
    """Runs of granules that shards need: ``[start, stop)`` for each ``shard``.

    Sorted by shard, then by start. Granules count from the first key of the call. The
    granules of the shard itself are among them.
    """

    shard: Int[np.ndarray, " runs"]
    start: Int[np.ndarray, " runs"]
    stop: Int[np.ndarray, " runs"]


def needs(maps: tuple[ir.Pred, ...], shards: Shards) -> Needs:
    """The granules that hold a key of some query of each shard, in any of ``maps``.

    ``maps`` are simplified predicates without heads. Run-time operands are unknown
    here: a key is needed if it is for some value of them.
    """
    every = maps[0] if len(maps) == 1 else simplify(ir.Or(maps))
    sizes = BlockSizes(
        shards.q_seq_len, shards.kv_seq_len, shards.q_size, shards.granule
    )
    mask = plan((every,), (0,), sizes)
    shard = np.repeat(np.arange(mask.num_rows), np.diff(mask.row_ptr))
    start, stop = (np.asarray(x, np.int64) for x in (mask.run_start, mask.run_stop))
    return _joined(Needs(shard, start, stop))


def _joined(found: Needs) -> Needs:
    """Runs that touch, such as a full and a partial one, become one."""
    if not len(found.shard):
        return found
    opens = np.append(
        True,
        (found.shard[1:] != found.shard[:-1]) | (found.start[1:] != found.stop[:-1]),
    )
    closes = np.append(opens[1:], True)
    return Needs(found.shard[opens], found.start[opens], found.stop[closes])


def from_others(found: Needs, shards: Shards) -> tuple[Needs, np.ndarray]:
    """The runs split at the edges of shards, without own ones; the owner of each."""
    size = shards.granules
    first, last = found.start // size, (found.stop - 1) // size
    count = last - first + 1
    run = np.repeat(np.arange(len(count)), count)
    owner = (
        first[run] + np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    )
    start = np.maximum(found.start[run], owner * size)
    stop = np.minimum(found.stop[run], (owner + 1) * size)
    shard = found.shard[run]
    keep = owner != shard
    return Needs(shard[keep], start[keep], stop[keep]), owner[keep]
