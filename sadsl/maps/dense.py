"""``dense_map``: a boolean array that is known before the call, as a map."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from lowering import ir
from sadsl.maps.base import IndexMap
from sadsl.maps.symbols import Truth
from sadsl.maps.traced_map import Where, traced_map

# More runs in a row than this are stored as bits: each run is two vectors of a kernel.
MOST_RUNS = 4
# The most entries of a table of bits. Tables are constants of a compiled program.
MOST_ENTRIES = 2**18


def dense_map(pairs: Bool[np.ndarray, "q_seq kv_seq"]) -> IndexMap:
    """The pairs where a boolean NumPy array is true.

    If no row, or no column, has more than four runs of true entries, the map is the
    ends of these runs: the plan of a call is exact and known before it runs. Other
    arrays are stored as bits, of which equal rows and equal columns share theirs. A
    call has at most as many queries and keys as the array, and then the first of them.

    Args:
      pairs: ``[q_seq, kv_seq]``, bools.

    Raises:
      TypeError: it is no array of bools.
      ValueError: it has not two axes, or it is too large to be stored as bits.

    Example:
      >>> import numpy as np, sadsl as sa
      >>> spec = sa.dense_map(np.eye(3, dtype=bool)) | sa.sinks(1)
      >>> print(spec.picture(3))
      #..
      ##.
      #.#
    """
    found = static_map(pairs)
    if found is None:
        raise ValueError(
            f"dense_map: an array of shape {pairs.shape} has more than {MOST_RUNS} "
            f"runs in a row and more than {MOST_ENTRIES} different entries: pass it to "
            "the call, as operands={'pairs': array}, and write where(lambda q, k: "
            "operand('pairs')[q, k] == 1)"
        )
    return found


def static_map(pairs: Bool[np.ndarray, "q_seq kv_seq"]) -> Where | None:
    """The map of ``dense_map``, or None if it would have too many constants."""
    if not isinstance(pairs, np.ndarray) or pairs.dtype != bool:
        raise TypeError(
            f"dense_map takes a NumPy array of bools, not {type(pairs).__name__} of "
            f"dtype {getattr(pairs, 'dtype', None)}: write np.asarray(x, bool); an "
            "array of a call is an operand"
        )
    if pairs.ndim != 2 or not pairs.size:
        raise ValueError(
            f"dense_map takes an array [q_seq, kv_seq], not one of shape {pairs.shape}"
        )
    for array, by in ((pairs, ir.Q), (pairs.T, ir.K)):
        runs = _runs(array)
        if runs.start.shape[1] <= MOST_RUNS:
            return _of_runs(runs, by)
    return _of_bits(pairs)


class RowRuns(NamedTuple):
    """The runs of each row, int ``[rows, most runs]``; spare ones are empty."""

    start: np.ndarray
    stop: np.ndarray


def _runs(array: np.ndarray) -> RowRuns:
    rows, columns = array.shape
    wide = np.zeros((rows, columns + 2), np.int8)
    wide[:, 1:-1] = array
    step = np.diff(wide, axis=1)
    row, start = np.nonzero(step == 1)
    _, stop = np.nonzero(step == -1)
    count = np.bincount(row, minlength=rows)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    found = RowRuns(*np.zeros((2, rows, max(count.max(), 1)), int))
    found.start[row, slot], found.stop[row, slot] = start, stop
    return found


# pairs = any(start[q] <= k & k < stop[q] for each run), or with q and k exchanged
def _of_runs(runs: RowRuns, by: ir.Var) -> Where:
    other = ir.K if by is ir.Q else ir.Q
    tests: list[ir.Pred] = []
    for start, stop in zip(runs.start.T, runs.stop.T, strict=True):
        first, end = (ir.Table(tuple(x.tolist()), by) for x in (start, stop))
        before = ir.Le(other, ir.Add(end, ir.Const(-1)))
        tests.append(ir.And((ir.Le(first, other), before)))
    return traced_map(Truth(ir.Or(tuple(tests)) if len(tests) > 1 else tests[0]))


# pairs = bits[kind_of_q[q] * kinds + kind_of_k[k]] == 1
def _of_bits(pairs: np.ndarray) -> Where | None:
    row, of_row = _kinds(pairs)
    column, of_column = _kinds(pairs.T)
    if len(row) * len(column) > MOST_ENTRIES:
        return None
    kinds = pairs[row][:, column]
    at_q, at_k = (
        ir.Table(tuple(kind.tolist()), axis)
        for kind, axis in ((of_row, ir.Q), (of_column, ir.K))
    )
    index = ir.Add(ir.Mul(at_q, kinds.shape[1]), at_k)
    values = tuple(kinds.astype(int).reshape(-1).tolist())
    return traced_map(Truth(ir.Eq(ir.Table(values, index), ir.Const(1))))


def _kinds(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row of each kind, and the kind of each row; equal rows are of one kind."""
    packed = np.packbits(array, axis=1)
    _, first, kind = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return first, kind.reshape(-1)
