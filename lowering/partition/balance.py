"""Deals chunks of queries to shards so that all have about the same work."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lowering import ir
from lowering.expr.simplify import simplify
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
    work = work_of_chunks(maps, shards)
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


def work_of_chunks(maps: tuple[ir.Pred, ...], shards: Shards) -> np.ndarray:
    """The work of each chunk of queries, ``[CHUNKS * shards]``."""
    every = maps[0] if len(maps) == 1 else simplify(ir.Or(maps))
    size = shards.q_size // CHUNKS
    sizes = BlockSizes(shards.q_seq_len, shards.kv_seq_len, size, shards.granule)
    mask = plan((every,), (0,), sizes)
    row = np.repeat(np.arange(mask.num_rows), np.diff(mask.row_ptr))
    length = (mask.run_stop - mask.run_start) * np.where(mask.run_full, 1.0, 0.5)
    return np.bincount(row, weights=length, minlength=CHUNKS * shards.count)


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
