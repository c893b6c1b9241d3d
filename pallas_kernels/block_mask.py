"""``BlockMask``: the blocks that a kernel visits, stored as runs, row by row."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

Axis = Literal["q", "kv"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockMask:
    """The blocks of an attention matrix that hold a pair, as runs of blocks.

    A row is a query block if ``by == "q"`` (forward, dq) and a key block if
    ``by == "kv"`` (dk, dv: the transposed plan). Row ``i`` of map ``m`` has the runs
    ``row_ptr[r] : row_ptr[r + 1]`` with ``r = m * num_rows + i`` (the CSR format). A
    run is the half-open range ``run_start : run_stop`` of blocks along the other axis,
    all full or all partial. The runs of a row ascend and do not overlap. Two runs of
    the same kind do not touch.

    A full block holds every pair of its tile and does not reach beyond the last key.
    A partial block needs the elementwise predicate. A block may reach beyond the last
    query in either orientation: such outputs are dropped and such gradients are zero.

    A plan that is known only at run time fills the same arrays with traced values. Its
    ``map_of_head`` may have an entry for every batch entry and head, ``[batch *
    heads]``. The values of ``map_of_head`` and ``test_of_map`` are known when the call
    is traced.
    """

    # int32 arrays: NumPy for a static plan, traced otherwise. The annotation is Any
    # because jax rebuilds a pytree with placeholders, which a checked one refuses.
    row_ptr: Any  # [rows + 1]
    run_start: Any  # [runs]
    run_stop: Any  # [runs]
    run_full: Any  # [runs]
    map_of_head: Any  # [heads], or [batch * heads]
    q_seq_len: int = field(metadata={"static": True})
    kv_seq_len: int = field(metadata={"static": True})
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})
    num_maps: int = field(default=1, metadata={"static": True})
    by: Axis = field(default="q", metadata={"static": True})
    # Static capacities: the largest number of runs and of blocks in any row.
    max_runs: int = field(default=0, metadata={"static": True})
    max_blocks: int = field(default=0, metadata={"static": True})
    # The number of the predicate's test of each map, int32 [num_maps]. None: map m has
    # test m.
    test_of_map: Any = None

    @property
    def num_q_blocks(self) -> int:
        """The number of query blocks; the last one may be partly beyond the queries."""
        return -(-self.q_seq_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        """The number of key blocks; the last one may be partly beyond the keys."""
        return -(-self.kv_seq_len // self.block_kv)

    @property
    def num_rows(self) -> int:
        """The number of rows of one map."""
        return self.num_q_blocks if self.by == "q" else self.num_kv_blocks

    @property
    def num_columns(self) -> int:
        """The number of blocks along a row."""
        return self.num_kv_blocks if self.by == "q" else self.num_q_blocks

    @property
    def test_of_head(self) -> Any:
        """The number of the predicate's test of each head, like ``map_of_head``."""
        if self.test_of_map is None:
            return self.map_of_head
        return self.test_of_map[self.map_of_head]

    @property
    def nbytes(self) -> int:
        """The bytes of the run lists."""
        arrays = (self.row_ptr, self.run_start, self.run_stop, self.run_full)
        return sum(a.nbytes for a in arrays)

    def visited_by_map(self) -> np.ndarray:
        """The number of blocks that each map visits, ``[maps]``; host arrays only."""
        return self._by_map(np.asarray(self.run_stop) - np.asarray(self.run_start))

    def partial_by_map(self) -> np.ndarray:
        """The number of partial blocks of each map, ``[maps]``; host arrays only."""
        lengths = np.asarray(self.run_stop) - np.asarray(self.run_start)
        return self._by_map(np.where(np.asarray(self.run_full) != 0, 0, lengths))

    def _by_map(self, lengths: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(total[np.asarray(self.row_ptr)[:: max(self.num_rows, 1)]])

    def transpose(self) -> "BlockMask":
        """The same blocks listed along the other axis; host arrays only."""
        full = expand(self) == FULL
        visited = expand(self) != EMPTY
        other: Axis = "kv" if self.by == "q" else "q"
        kinds = np.where(full, FULL, np.where(visited, PARTIAL, EMPTY))
        return from_blocks(
            np.swapaxes(kinds, 1, 2),
            map_of_head=np.asarray(self.map_of_head),
            like=replace(self, by=other),
        )


EMPTY, PARTIAL, FULL = 0, 1, 2


def expand(mask: BlockMask) -> np.ndarray:
    """The kind of every block, int8 ``[maps, rows, columns]``; host arrays only.

    Kernels never build this dense table, whose memory is rows times columns.
    """
    ptr, start, stop, full = (
        np.asarray(x)
        for x in (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
    )
    row = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    kind = np.where(full != 0, FULL, PARTIAL).astype(np.int8)
    steps = np.zeros((mask.num_maps * mask.num_rows, mask.num_columns + 1), np.int8)
    # No two runs of a row have the same start or the same stop: += adds each once.
    steps[row, start] += kind
    steps[row, stop] -= kind
    kinds = np.cumsum(steps, axis=1, dtype=np.int8)[:, :-1]
    return kinds.reshape(mask.num_maps, mask.num_rows, mask.num_columns)


def from_blocks(
    kinds: np.ndarray, *, map_of_head: np.ndarray, like: BlockMask
) -> BlockMask:
    """A host BlockMask of a table of kinds, int ``[maps, rows, columns]``.

    The sizes are those of ``like``.
    """
    flat = kinds.reshape(-1, kinds.shape[-1])
    edge = np.zeros((len(flat), 1), flat.dtype)
    padded = np.concatenate([edge, flat, edge], axis=1)
    changes = padded[:, 1:] != padded[:, :-1]
    row, at = np.nonzero(changes)
    kind = padded[row, at + 1]
    start = kind != EMPTY
    # The change after the one that opens a run is in the same row and closes the run.
    stop = at[np.flatnonzero(start) + 1]
    return from_runs(
        row[start], at[start], stop, kind[start] == FULL,
        map_of_head=map_of_head, like=like,
    )  # fmt: skip


def from_runs(
    row: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    full: np.ndarray,
    *,
    map_of_head: np.ndarray,
    like: BlockMask,
) -> BlockMask:
    """A host BlockMask of runs sorted by (row, start); sizes from ``like``.

    ``row``, ``start``, ``stop`` (int) and ``full`` (bool) are ``[runs]``.
    """
    num_maps = int(map_of_head.max(initial=0)) + 1
    rows = num_maps * like.num_rows
    count = np.bincount(row, minlength=rows)
    blocks = np.bincount(row, weights=stop - start, minlength=rows)
    return replace(
        like,
        row_ptr=np.concatenate([[0], np.cumsum(count)]).astype(np.int32),
        run_start=start.astype(np.int32),
        run_stop=stop.astype(np.int32),
        run_full=full.astype(np.int32),
        map_of_head=map_of_head.astype(np.int32),
        num_maps=num_maps,
        max_runs=int(count.max(initial=0)),
        max_blocks=int(blocks.max(initial=0)),
    )


def blank(
    q_seq_len: int, kv_seq_len: int, block_q: int, block_kv: int, by: Axis = "q"
) -> BlockMask:
    """A mask with sizes and no runs, to pass as ``like`` to the functions above."""
    none = np.zeros(0, np.int32)
    return BlockMask(
        none, none, none, none, none, q_seq_len, kv_seq_len, block_q, block_kv, by=by
    )


def check(mask: BlockMask) -> None:
    """Asserts the invariants of the class docstring; host arrays only."""
    ptr, start, stop = (
        np.asarray(a) for a in (mask.row_ptr, mask.run_start, mask.run_stop)
    )
    assert len(ptr) == mask.num_maps * mask.num_rows + 1
    assert ptr[0] == 0
    assert ptr[-1] == len(start)
    assert np.all(np.diff(ptr) >= 0)
    assert np.all(start < stop)
    assert np.all(start >= 0)
    assert np.all(stop <= mask.num_columns)
    row = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    same = row[1:] == row[:-1]
    full = np.asarray(mask.run_full) != 0
    assert np.all(~same | (stop[:-1] <= start[1:]))
    touching = same & (stop[:-1] == start[1:]) & (full[1:] == full[:-1])
    assert not np.any(touching)
