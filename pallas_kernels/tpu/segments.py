"""The plan of the backward kernel: key blocks by segments of queries.

dq of a segment of queries stays in VMEM, so a key block is visited once in each segment
whose queries see it. A row of the kernel is such a pair of a segment and a key block.
The rows of a segment follow each other.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.tpu import chips, runs
from pallas_kernels.tpu.runs import TpuSizes

# The bytes of dq that stay in VMEM. More is used if the list of rows needs it.
RESIDENT_BYTES = 4 << 20
# Flags of a row.
OPENS, CLOSES, ADDS, WRITES = 1, 2, 4, 8


@dataclass(frozen=True)
class QuerySegments:
    """How the queries of the heads that share keys are divided into segments.

    A segment has ``blocks`` query blocks of ``members`` query heads. A query head has
    ``of_head`` segments, and the ``group`` of a key head has ``group // members`` times
    as many.
    """

    blocks: int
    of_head: int
    members: int
    group: int

    @property
    def count(self) -> int:
        """The number of segments of a key head."""
        return self.of_head * (self.group // self.members)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackwardPlan:
    """The rows of the backward kernel, in one of two forms.

    - List: row ``r`` of key head ``h`` has the words ``(key block, flags + 16 *
      segment)`` from ``places[2 * (first_place[h] + r)]`` on. For query head ``q``, it
      has the runs ``begin : end`` of ``runs``, the words from ``row_runs[2 *
      (first_row[q] + r)]`` on. No run crosses the border of a segment.
    - Table: the rows are all pairs of a segment and a key block. ``table`` has the runs
      of each key block over all queries, as in ``runs.TpuPlan``.

    ``test_of_head`` and ``first_row`` repeat with their length as period, and so does
    ``first_place``.
    """

    # int32. Any, because jax rebuilds a pytree with placeholders in it.
    test_of_head: Any  # [heads]
    first_row: Any  # [heads]
    first_place: Any  # [key heads] or None
    places: Any  # [2 * rows] or None
    row_runs: Any  # [2 * rows] or None
    runs: Any  # [2 * runs] or None
    table: Any  # [key blocks, 1, 1 + 2 * max_runs] or None
    sizes: TpuSizes = field(metadata={"static": True})
    segments: QuerySegments = field(metadata={"static": True})
    num_rows: int = field(metadata={"static": True})


class Place(NamedTuple):
    """Where a row lies; int32 and bool scalars."""

    column: Any  # key block
    segment: Any  # of a query head
    chunk: Any  # index of the query heads of the segment in their group
    opens: Any  # first row of its segment
    closes: Any  # last row of its segment
    adds: Any  # an earlier row has the same key block
    writes: Any  # false for rows that only fill the list of a head


def place_of(plan: BackwardPlan, scalars: Any, head: Any, row: Any) -> Place:
    """The place of a row of a key head; ``scalars`` has the arrays of ``plan``."""
    of_head = np.int32(plan.segments.of_head)
    if plan.places is None:
        columns = np.int32(plan.sizes.num_rows)
        number, column = lax.div(row, columns), lax.rem(row, columns)
        segment, chunk = lax.rem(number, of_head), lax.div(number, of_head)
        opens, closes = column == 0, column == columns - 1
        return Place(column, segment, chunk, opens, closes, number > 0, column >= 0)
    period = np.int32(plan.first_place.shape[0])
    at = 2 * (scalars.first_place[lax.rem(head, period)] + row)
    column, word = scalars.places[at], scalars.places[at + 1]
    number = lax.shift_right_logical(word, np.int32(4))
    segment, chunk = lax.rem(number, of_head), lax.div(number, of_head)
    flags = ((word & flag) != 0 for flag in (OPENS, CLOSES, ADDS, WRITES))
    return Place(column, segment, chunk, *flags)


def plan_of(mask: BlockMask, group: int, head_dim: int) -> BackwardPlan:
    """The plan of a mask by keys, whose key heads have ``group`` query heads each.

    Raises:
      ValueError: a traced mask without ``max_runs``.
      NotImplementedError: the runs of one key block do not fit scalar memory.
    """
    # The chip pads the channels to the rows of a vector register.
    block_bytes = 4 * mask.block_q * (-(-head_dim // 8) * 8)
    most = max(1, chips.vmem_bytes() // 4 // block_bytes)
    resident = min(most, max(1, RESIDENT_BYTES // block_bytes))
    while runs.is_static(mask):
        listed = _listed(mask, _segments(resident, mask, group))
        if listed is not None:
            return listed
        if resident == most:
            break
        resident = min(2 * resident, most)
    found, segments = runs.table_plan(mask), _segments(most, mask, group)
    return BackwardPlan(
        test_of_head=found.test_of_head,
        first_row=found.first_row,
        first_place=None,
        places=None,
        row_runs=None,
        runs=None,
        table=found.table,
        sizes=found.sizes,
        segments=segments,
        num_rows=segments.count * found.sizes.num_rows,
    )


def _segments(resident: int, mask: BlockMask, group: int) -> QuerySegments:
    """Segments of at most ``resident`` blocks: of all heads of a group if possible."""
    divisors = (m for m in range(1, group + 1) if group % m == 0 and m <= resident)
    members = max(divisors)
    num_blocks = max(1, mask.num_q_blocks)
    of_head = -(-num_blocks // min(num_blocks, resident // members))
    return QuerySegments(-(-num_blocks // of_head), of_head, members, group)


class _Pieces(NamedTuple):
    """Runs cut at the borders of segments, sorted by ``key`` and then by start.

    The key is ``(map * segments + segment) * key blocks + key block``.
    """

    key: np.ndarray
    words: np.ndarray  # [pieces, 2]


def _listed(mask: BlockMask, segments: QuerySegments) -> BackwardPlan | None:
    """The plan as a list; None if it does not fit scalar memory."""
    pieces = _pieces(mask, segments.blocks, segments.of_head)
    maps = np.asarray(mask.map_of_head)
    num_heads = math.lcm(len(maps), segments.group)
    of_head = np.resize(maps, num_heads).reshape(-1, segments.group)
    classes, class_of = np.unique(of_head, axis=0, return_inverse=True)
    listed = [_rows_of(x, pieces, mask, segments) for x in classes]
    num_rows = max(len(keys) for keys, _, _ in listed)
    places, row_runs, first_row = [], [], {}
    for number, (keys, place, maps_of_class) in enumerate(listed):
        short = num_rows - len(keys)
        # Rows that fill the list repeat the last block, which is then not copied again.
        last = np.array([[place[-1, 0], place[-1, 1] & ~15]], np.int64)
        places.append(np.concatenate([place, np.repeat(last, short, axis=0)]))
        for own in maps_of_class:
            first_row[number, own] = num_rows * len(row_runs)
            row_runs.append(_ranges(pieces, keys, own, mask, segments, num_rows))
    words = pieces.words if len(pieces.words) else np.zeros((1, 2), np.int64)
    class_of = class_of.reshape(-1)
    rows = [
        first_row[number, own]
        for number, maps_of_key_head in zip(class_of, of_head, strict=True)
        for own in maps_of_key_head
    ]
    found = BackwardPlan(
        test_of_head=np.resize(np.asarray(mask.test_of_head, np.int32), num_heads),
        first_row=np.asarray(rows, np.int32),
        first_place=(class_of * num_rows).astype(np.int32),
        places=_flat(np.concatenate(places)),
        row_runs=_flat(np.concatenate(row_runs)),
        runs=_flat(words),
        table=None,
        sizes=runs.sizes_of(mask),
        segments=segments,
        num_rows=num_rows,
    )
    size = sum(x.nbytes for x in jax.tree.leaves(found))
    return found if size <= runs.SCALAR_BYTES else None


def _flat(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32).reshape(-1)


def _pieces(mask: BlockMask, size: int, count: int) -> _Pieces:
    start, stop = (np.asarray(x, np.int64) for x in (mask.run_start, mask.run_stop))
    full = np.asarray(mask.run_full) != 0
    row = np.repeat(np.arange(len(mask.row_ptr) - 1), np.diff(mask.row_ptr))
    own_map, column = np.divmod(row, max(1, mask.num_rows))
    first = start // size
    parts = (stop - 1) // size - first + 1
    run = np.repeat(np.arange(len(start)), parts)
    within = np.arange(len(run)) - np.repeat(np.cumsum(parts) - parts, parts)
    segment = first[run] + within
    begin = np.maximum(start[run], segment * size)
    end = np.minimum(stop[run], (segment + 1) * size)
    key = (own_map[run] * count + segment) * mask.num_rows + column[run]
    order = np.argsort(key, kind="stable")
    words = np.stack([2 * begin + full[run], end], axis=1)
    return _Pieces(key[order], words[order])


def _rows_of(
    maps: np.ndarray, pieces: _Pieces, mask: BlockMask, segments: QuerySegments
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The rows of a key head whose query heads have these maps.

    Returns for each row the key ``segment * key blocks + key block`` and the words of
    ``BackwardPlan.places``, and the maps without repetition.
    """
    columns, of_head = max(1, mask.num_rows), segments.of_head
    chunks = []
    for chunk in maps.reshape(-1, segments.members):
        live = [_keys_of_map(pieces, m, of_head * columns) for m in set(chunk.tolist())]
        keys = np.unique(np.concatenate(live))
        unseen = np.setdiff1d(np.arange(of_head), keys // columns)
        # dq of these segments is zero and must be written.
        chunks.append(np.union1d(keys, unseen * columns))
    seen = np.concatenate(chunks) % columns
    # dk and dv of these key blocks are zero and must be written.
    unseen = np.setdiff1d(np.arange(mask.num_rows), seen)
    chunks[-1] = np.union1d(chunks[-1], (of_head - 1) * columns + unseen)
    chunk = np.repeat(np.arange(len(chunks)), [len(x) for x in chunks])
    keys = np.concatenate(chunks)
    segment, column = np.divmod(keys, columns)
    segment += chunk * of_head
    changes = np.flatnonzero(np.diff(segment))
    flags = np.full(len(keys), WRITES + ADDS)
    flags[np.unique(column, return_index=True)[1]] -= ADDS
    flags[np.append(0, changes + 1)] += OPENS
    flags[np.append(changes, len(keys) - 1)] += CLOSES
    words = np.stack([column, flags + 16 * segment], axis=1)
    return keys, words, sorted(set(maps.tolist()))


def _keys_of_map(pieces: _Pieces, own: int, size: int) -> np.ndarray:
    """The keys of the rows in which a map has a run, without the map's number."""
    begin, end = np.searchsorted(pieces.key, [own * size, (own + 1) * size])
    return pieces.key[begin:end] - own * size


def _ranges(
    pieces: _Pieces, keys: np.ndarray, own: int, mask: BlockMask,
    segments: QuerySegments, num_rows: int,
) -> np.ndarray:  # fmt: skip
    """The ranges of ``pieces`` of each row in one map, int ``[num_rows, 2]``."""
    keys = keys + own * segments.of_head * mask.num_rows
    sides = [np.searchsorted(pieces.key, keys, side) for side in ("left", "right")]
    found = np.stack(sides, axis=1)
    return np.pad(found, ((0, num_rows - len(found)), (0, 0)))


def count_rows(plan: BackwardPlan, num_key_heads: int) -> tuple[int, int]:
    """The rows of all key heads of a batch entry, and how many add to earlier ones.

    Rows that only fill the list of a head do not count.
    """
    if plan.places is None:
        columns = plan.sizes.num_rows
        return num_key_heads * plan.num_rows, num_key_heads * (plan.num_rows - columns)
    flags = plan.places[1::2].reshape(-1, plan.num_rows)
    classes = np.resize(plan.first_place // plan.num_rows, num_key_heads)
    of_head = flags[classes]
    written, added = (int(((of_head & flag) != 0).sum()) for flag in (WRITES, ADDS))
    return written, added
