"""Where the queries of a mask stand, and where its arrays are: known, or operands.

If the queries of a kernel are split over devices, a device learns their positions from
its part of an operand. Otherwise positions are constants, and plans are made once.
"""

from typing import Any

import numpy as np

from lowering import ir
from sadsl.maps.base import IndexMap
from sadsl.maps.dense import dense_map, static_map
from sadsl.maps.symbols import Truth
from sadsl.maps.traced_map import traced_map


class MaskPlaces:
    """Every position and array is a constant of the map."""

    def with_rows(self, pairs: IndexMap, sequence: np.ndarray | None) -> IndexMap:
        """The map of queries at the positions ``sequence``; from 0 on if None."""
        if sequence is None or np.array_equal(sequence, np.arange(len(sequence))):
            return pairs
        return _at(pairs, ir.Table(tuple(np.asarray(sequence).tolist()), ir.Q))

    def dense(self, array: np.ndarray) -> IndexMap:
        """The pairs where an array is true.

        Raises:
          ValueError: it needs more constants than ``dense_map`` stores.
        """
        return dense_map(array)


STATIC = MaskPlaces()


class Leaves(MaskPlaces):
    """Arrays that are too large for constants are collected, as leaves of a kernel.

    Attributes:
      arrays: the arrays by name.
      axes: what each axis of an array is: "heads", "q" or None, by name.
    """

    def __init__(self, q_seq_len: int, q_seq_shards: int) -> None:
        self.q_seq_len, self.is_split = q_seq_len, q_seq_shards > 1
        self.arrays: dict[str, Any] = {}
        self.axes: dict[str, tuple[str | None, ...]] = {}

    def with_rows(self, pairs: IndexMap, sequence: np.ndarray | None) -> IndexMap:
        """The map of queries at these positions, which the split queries read."""
        if not self.is_split:
            return super().with_rows(pairs, sequence)
        if sequence is None:
            sequence = np.arange(self.q_seq_len)
        name = self.add("rows", np.asarray(sequence, np.int32), ("q",))
        return _at(pairs, ir.Operand(name, (ir.Q,)))

    def dense(self, array: np.ndarray) -> IndexMap:
        """The pairs where an array is true: constants, or a leaf if they are many."""
        found = None if self.is_split else static_map(array)
        if found is not None:
            return found
        name = self.add("pairs", array, ("q", None))
        return traced_map(Truth(_is_true(name, (ir.Q, ir.K))))

    def dynamic(self, array: Any) -> IndexMap:
        """The pairs of a run-time array ``[heads, q_seq, kv_seq]``, or of two axes."""
        axes, index = ("heads", "q", None), (ir.H, ir.Q, ir.K)
        name = self.add("pairs", array, axes[-array.ndim :])
        return traced_map(Truth(_is_true(name, index[-array.ndim :])))

    def by_head(self, maps: tuple[IndexMap, ...], of_head: np.ndarray) -> IndexMap:
        """The map ``of_head[h]`` for head ``h``, where heads are split over devices."""
        name = self.add("mask_of_head", of_head.astype(np.int32), ("heads",))
        entry = ir.Operand(name, (ir.H,))
        terms = [
            ir.And((ir.Eq(entry, ir.Const(i)), pairs.node))
            for i, pairs in enumerate(maps)
        ]
        return traced_map(Truth(ir.Or(tuple(terms))))

    def add(self, what: str, array: Any, axes: tuple[str | None, ...]) -> str:
        """The name of a leaf with this array; equal arrays of NumPy share one."""
        for name, old in self.arrays.items():
            same = isinstance(old, np.ndarray) and isinstance(array, np.ndarray)
            if same and self.axes[name] == axes and np.array_equal(old, array):
                return name
        name = f"splash_{what}_{len(self.arrays)}"
        self.arrays[name], self.axes[name] = array, axes
        return name


def _at(pairs: IndexMap, row: ir.Expr) -> IndexMap:
    return traced_map(Truth(ir.substitute(pairs.node, {"q": row})))


def _is_true(name: str, index: tuple[ir.Expr, ...]) -> ir.Pred:
    return ir.Eq(ir.Operand(name, index), ir.Const(1))
