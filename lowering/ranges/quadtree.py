"""A tree of squares of blocks in which equal squares are stored once.

Each square is empty, partial throughout, full, or split into parts. Rows of a plan
are joined from the rows of the parts, the smallest squares first. As equal squares
share their rows, this costs little more than the last step, which writes all runs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The numbers of squares that are not split; those that are have numbers from FIRST on.
EMPTY, PARTIAL, FULL, FIRST = 0, 1, 2, 3
# A run is one integer, ``start << 32 | stop << 1 | full``; this moves it by one block.
STEP = (1 << 32) + 2
LOW = (1 << 32) - 1


class Parts(NamedTuple):
    """The squares ``size`` blocks wide that are parts of the squares one level above.

    ``kind`` is the number of each part, and ``blocks`` how many blocks of it lie inside
    of the plan, int ``[squares above, parts, parts]`` each. The number of a square that
    is split is ``FIRST`` plus its place in the next level.
    """

    size: int
    kind: np.ndarray
    blocks: np.ndarray


class RunRows(NamedTuple):
    """Rows of runs: row ``i`` has ``runs[ptr[i] : ptr[i + 1]]``, each one integer."""

    ptr: np.ndarray
    runs: np.ndarray


@dataclass(frozen=True, eq=False)
class Tree:
    """The squares of a plan, level by level; the first level has the root alone."""

    levels: tuple[Parts, ...]

    def count(self) -> tuple[int, int]:
        """The numbers of visited and of partial blocks."""
        visited = partial = np.zeros(0, np.int64)
        for level in reversed(self.levels):
            visited = _total(level, level.kind != EMPTY, visited)
            partial = _total(level, level.kind == PARTIAL, partial)
        return int(visited.sum()), int(partial.sum())

    def rows(self, num_rows: int, num_columns: int, *, across: bool = False) -> RunRows:
        """The runs of every row of blocks, or of every column if ``across``.

        The rows of squares up to some size are joined from those of their parts, each
        square once. From these squares the rows are then joined in one step.
        """
        last = self._joint()
        found = _with_plain(_no_rows(), self.levels[-1].size)
        for n in range(len(self.levels) - 1, last, -1):
            level, above = self.levels[n], self.levels[n - 1]
            kind = np.swapaxes(level.kind, 1, 2) if across else level.kind
            found = _with_plain(_joined(kind, level.size, found), above.size)
        i, j, kind = self._occurring(last)
        i, j = (j, i) if across else (i, j)
        size = self.levels[last].size
        inside = (i * size < num_rows) & (j * size < num_columns)
        i, j, kind = i[inside], j[inside], kind[inside]
        order = np.lexsort((j, i))
        found = _placed(i[order], j[order], kind[order], size, found, num_rows)
        over = np.maximum(((found.runs & LOW) >> 1) - num_columns, 0)
        return found._replace(runs=found.runs - (over << 1))

    def _joint(self) -> int:
        """The level from which rows are joined at once: the one of least cost.

        It costs the rows of different squares below, and those of all squares above.
        """
        below = np.array([level.kind.size * level.size for level in self.levels])
        below = below.sum() - np.cumsum(below)
        # How often each square of a level occurs; blocks of uniform ones above.
        times, plain, costs = np.ones(1, np.int64), 0, []
        for level in self.levels:
            of = np.repeat(times, level.kind[0].size)
            kind = level.kind.ravel()
            split = kind >= FIRST
            plain += int(of[(kind != EMPTY) & ~split].sum()) * level.size**2
            times = np.bincount(kind[split] - FIRST, of[split]).astype(np.int64)
            costs.append(int(times.sum()) * level.size + plain // level.size)
        return int(np.argmin(np.array(costs) + below))

    def _occurring(self, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where squares of a level are, in their size, and their kinds: ``[squares]``.

        Empty squares are left out.
        """
        i = j = np.zeros(1, np.int64)
        kind = np.full(1, FIRST, np.int64)
        size = self.levels[0].size
        for level in self.levels[: last + 1]:
            parts = size // level.size if level is not self.levels[0] else 1
            step = np.arange(parts)
            shape = (len(kind), parts, parts)
            i = np.broadcast_to((i * parts)[:, None, None] + step[:, None], shape)
            j = np.broadcast_to((j * parts)[:, None, None] + step, shape)
            split = kind >= FIRST
            new = np.broadcast_to(kind[:, None, None], shape).copy()
            new[split] = level.kind[kind[split] - FIRST]
            taken = new != EMPTY
            i, j, kind, size = i[taken], j[taken], new[taken], level.size
        return i, j, kind


def _no_rows() -> RunRows:
    return RunRows(np.zeros(1, np.int64), np.zeros(0, np.int64))


def _total(level: Parts, counted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Blocks of the squares above, by parts: of ``counted`` ones all, of split ones."""
    split = level.kind >= FIRST
    blocks = np.where(counted, level.blocks, 0)
    blocks[split] = found[level.kind[split] - FIRST]
    return blocks.reshape(len(blocks), -1).sum(axis=1)


def _with_plain(rows: RunRows, size: int) -> RunRows:
    """``rows`` after those of an empty, a partial and a full square of ``size``."""
    plain = np.repeat(np.array([size << 1, size << 1 | 1], np.int64), size)
    ptr = np.concatenate([np.zeros(size, np.int64), np.arange(2 * size)])
    return RunRows(
        np.concatenate([ptr, rows.ptr + 2 * size]), np.concatenate([plain, rows.runs])
    )


def _joined(kind: np.ndarray, size: int, parts: RunRows) -> RunRows:
    """The rows of squares whose parts, ``size`` wide, have the rows ``parts``."""
    place = np.arange(size)[:, None]
    # [squares, part of the row, row within the part, part of the column]
    of = kind[:, :, None, :] * size + place
    first = parts.ptr[of]
    length = parts.ptr[of + 1] - first
    moved = np.broadcast_to(np.arange(kind.shape[2]) * (size * STEP), of.shape)
    first, length, moved = first.ravel(), length.ravel(), moved.ravel()
    ends = np.cumsum(length)
    at = np.repeat(first - (ends - length), length)
    at += np.arange(len(at))
    runs = parts.runs[at]
    runs += np.repeat(moved, length)
    return _merged(np.append(0, ends[kind.shape[2] - 1 :: kind.shape[2]]), runs)


def _merged(ptr: np.ndarray, runs: np.ndarray) -> RunRows:
    """The same rows with touching runs of one kind joined."""
    if not len(runs):
        return RunRows(ptr, runs)
    # The low half of a run that would touch this one and be of its kind.
    begin = ((runs >> 32) << 1) | (runs & 1)
    joins = np.zeros(len(runs) + 1, bool)
    joins[1:-1] = (runs[:-1] & LOW) == begin[1:]
    joins[ptr] = False
    if not joins.any():
        return RunRows(ptr, runs)
    heads = np.flatnonzero(~joins[:-1])
    last = np.append(heads[1:], len(runs)) - 1
    runs = (runs[heads] & ~LOW) | (runs[last] & LOW)
    kept = np.concatenate([[0], np.cumsum(~joins[:-1])])
    return RunRows(kept[ptr], runs)


def _placed(
    i: np.ndarray,
    j: np.ndarray,
    kind: np.ndarray,
    size: int,
    parts: RunRows,
    num_rows: int,
) -> RunRows:
    """The rows of a plan from its squares, sorted by ``i``, then by ``j``."""
    count = np.bincount(i, minlength=-(-num_rows // size))
    of_row = np.repeat(count, size)[:num_rows]
    ptr = np.append(0, np.cumsum(of_row))
    row = np.repeat(np.arange(num_rows), of_row)
    # The squares of a row are those of the first row of its squares.
    square = (
        np.arange(len(row))
        + (np.repeat(np.cumsum(count) - count, size)[:num_rows] - ptr[:-1])[row]
    )
    part = kind[square] * size + row % size
    first = parts.ptr[part]
    length = parts.ptr[part + 1] - first
    ends = np.append(0, np.cumsum(length))
    at = np.repeat(first - ends[:-1], length)
    at += np.arange(len(at))
    runs = parts.runs[at]
    runs += np.repeat(j[square] * (size * STEP), length)
    return _merged(ends[ptr], runs)
