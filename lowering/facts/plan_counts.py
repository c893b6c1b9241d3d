"""Plan: the blocks of a map, and their counts."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lowering import ir
from lowering.facts.count_pairs import count_by_form
from lowering.order.candidates import Layouts
from lowering.planning import BlockSizes
from lowering.ranges.ranges import Rectangles
from lowering.ranges.refine import count_within
from pallas_kernels.block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class Plan:
    """The blocks that kernels visit, for all distinct maps of the heads.

    Blocks and pairs are counted over all *distinct* maps: heads that share a map count
    once. ``num_full + num_partial + num_empty == num_blocks``.
    """

    maps: tuple[ir.Pred, ...]
    mask: BlockMask
    num_heads: int
    # The order of positions of ``maps`` and ``mask``, if it is not the given one. Then
    # also the numbers of full and partial blocks, and the maps, in the given order.
    layouts: Layouts | None = None
    given: tuple[int, int] | None = None
    given_maps: tuple[ir.Pred, ...] = ()

    @cached_property
    def num_full(self) -> int:
        """Blocks whose pairs all attend; a kernel does not test them."""
        return int(self._lengths[np.asarray(self.mask.run_full) != 0].sum())

    @cached_property
    def num_partial(self) -> int:
        """Blocks of which some pairs attend, or that extend beyond the last key."""
        return int(self._lengths.sum()) - self.num_full

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self.mask.num_maps * self.mask.num_rows * self.mask.num_columns

    @property
    def num_empty(self) -> int:
        """Blocks without a pair, which are never visited."""
        return self.num_blocks - self.num_full - self.num_partial

    @property
    def num_runs(self) -> int:
        """Runs of full or of partial blocks."""
        return len(self.mask.run_start)

    @property
    def nbytes(self) -> int:
        """Bytes of the run lists."""
        return self.mask.nbytes

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the run-time arrays that the maps read."""
        return tuple(sorted({x for m in self.maps for x in ir.operand_names(m)}))

    @property
    def num_pairs(self) -> int:
        """The exact number of pairs (query, key) that attend, counted on first use.

        Raises:
          ValueError: the pairs depend on run-time arrays.
        """
        return sum(self.pairs_of_maps)

    @cached_property
    def pairs_of_maps(self) -> tuple[int, ...]:
        """``num_pairs`` of each distinct map.

        Raises:
          ValueError: the pairs depend on run-time arrays.
        """
        if self.operands:
            raise ValueError(
                f"num_pairs depends on the run-time arrays {list(self.operands)}: "
                "count `spec.dense(..., operands=...)` for given ones, or read "
                "num_full and num_partial, the blocks that may be visited"
            )
        return tuple(self.pairs_of_map(m) for m in range(len(self.maps)))

    def pairs_of_map(self, m: int) -> int:
        """Pairs of one of the distinct maps; the map reads no run-time array."""
        mask = self.mask
        node, lengths = self.maps[m], (mask.q_seq_len, mask.kv_seq_len)
        if self.layouts is not None and self.given_maps:
            # The number does not depend on the order, and the given map is simpler.
            node = self.given_maps[m]
            lengths = self.layouts.q.length, self.layouts.kv.length
        found = count_by_form(node, *lengths)
        return self._count_in_runs(m) if found is None else found

    def _count_in_runs(self, m: int) -> int:
        """Pairs of one map, counted in the blocks that are visited."""
        mask = self.mask
        ptr = np.asarray(mask.row_ptr)[m * mask.num_rows : (m + 1) * mask.num_rows + 1]
        row = np.repeat(np.arange(mask.num_rows), np.diff(ptr))
        runs = slice(int(ptr[0]), int(ptr[-1]))
        start, stop = mask.run_start[runs], mask.run_stop[runs]
        sizes = BlockSizes(mask.q_seq_len, mask.kv_seq_len, mask.block_q, mask.block_kv)
        # A run is one rectangle: a full one counts at once, a partial one by descent.
        left = sizes.elements(row.astype(np.int64), start.astype(np.int64), 1)
        right = sizes.elements(row.astype(np.int64), stop.astype(np.int64) - 1, 1)
        at = Rectangles(left.q_min, left.q_max, left.k_min, right.k_max)
        return count_within(self.maps[m], at)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.asarray(self.mask.run_stop) - np.asarray(self.mask.run_start)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values of the counts that are cheap to compute, for printing."""
        mask = self.mask
        return [
            ("queries x keys", f"{mask.q_seq_len:,} x {mask.kv_seq_len:,}"),
            ("block_q x block_kv", f"{mask.block_q} x {mask.block_kv}"),
            ("heads, distinct maps", f"{self.num_heads}, {mask.num_maps}"),
            ("full blocks", f"{self.num_full:,}"),
            ("partial blocks", f"{self.num_partial:,}"),
            ("empty blocks", f"{self.num_empty:,}"),
            ("visited", f"{1 - self.num_empty / max(self.num_blocks, 1):.2%}"),
            ("runs", f"{self.num_runs:,} ({self.nbytes:,} bytes)"),
            *self._layout_rows(),
        ]

    def _layout_rows(self) -> list[tuple[str, str]]:
        if self.layouts is None or self.given is None:
            return []
        q, kv = self.layouts
        orders = (
            [("order", f"{q}")]
            if q == kv
            else [("order of queries", f"{q}"), ("order of keys", f"{kv}")]
        )
        full, partial = self.given
        visited = self.num_full + self.num_partial
        gain = (full + partial) / max(visited, 1)
        text = f"{full:,} full, {partial:,} partial blocks ({gain:.2f} x as many)"
        return [*orders, ("in the given order", text)]

    def __str__(self) -> str:
        return "\n".join(f"{name:<22}{value}" for name, value in self.rows())
