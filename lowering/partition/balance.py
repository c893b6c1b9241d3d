"""Deals chunks of queries to shards so that all have about the same work."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lowering import ir
from lowering.partition.shards import Shards
from lowering.planning import BlockSizes, plan

# A shard has so many chunks of queries.
CHUNKS = 2
# Queries move only where the busiest shard gets so much less work.
LEAST_GAIN = 1.2


@dataclass(frozen=True)
class Balance:
    """Which chunks of queries each shard works on.

    Attributes:
      chunks: for each shard, two chunks, counted over the whole call.
      before: the work of the busiest shard over the mean, if each keeps its own.
      after: the same with ``chunks``.
    """

    chunks: tuple[tuple[int, int], ...]
    before: float
    after: float


@lru_cache(maxsize=256)
def balance(maps: tuple[ir.Pred, ...], shards: Shards) -> Balance | None:
    """The chunks of each shard, if they are worth moving; else None.

    Work is counted in visited granules of keys, partial ones for a half. The heaviest
    chunk goes with the lightest one, the second heaviest with the second lightest, and
    so on: for a causal map that is the zigzag of Llama 3 (Grattafiori et al., The Llama
    3 herd of models, 2024, section 3.3.2).
    """
    if shards.count == 1 or shards.q_size % CHUNKS:
        return None
    work = work_by_rows(maps, shards, shards.q_size // CHUNKS)
    total = work.reshape(shards.count, CHUNKS).sum(axis=1)
    if not total.any():
        return None
    order = np.argsort(-work, kind="stable")
    pairs = zip(order[: shards.count], order[::-1], strict=False)
    # Pairs stay with the shard that has one of their chunks, as far as one does.
    chunks = _near_home([(int(a), int(b)) for a, b in pairs], shards.count)
    after = np.array([work[list(pair)].sum() for pair in chunks])
    found = Balance(
        tuple(chunks),
        float(total.max() / total.mean()),
        float(after.max() / after.mean()),
    )
    return found if found.before >= LEAST_GAIN * found.after else None


@lru_cache(maxsize=256)
def imbalance(maps: tuple[ir.Pred, ...], shards: Shards) -> float:
    """The work of the busiest shard over the mean, if each keeps its own queries."""
    work = work_by_rows(maps, shards, shards.q_size)
    return float(work.max() / work.mean()) if work.any() else 1.0


def work_by_rows(maps: tuple[ir.Pred, ...], shards: Shards, size: int) -> np.ndarray:
    """The work of each ``size`` queries of all shards, over all distinct maps."""
    sizes = BlockSizes(shards.q_seq_len, shards.kv_seq_len, size, shards.granule)
    mask = plan(maps, tuple(range(len(maps))), sizes)
    row = np.tile(np.arange(mask.num_rows), len(maps))
    row = np.repeat(row, np.diff(mask.row_ptr))
    length = (mask.run_stop - mask.run_start) * np.where(mask.run_full, 1.0, 0.5)
    rows = shards.count * shards.q_size // size
    return np.bincount(row, weights=length, minlength=rows)


def _near_home(pairs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Each pair at a shard, at one that has one of its chunks if that is free."""
    found: list[tuple[int, int] | None] = [None] * count
    rest = []
    for pair in pairs:
        homes = [chunk // CHUNKS for chunk in pair if found[chunk // CHUNKS] is None]
        if homes:
            found[homes[0]] = pair
        else:
            rest.append(pair)
    return [pair if pair is not None else rest.pop() for pair in found]
