"""The plan as the TPU kernels read it: runs in scalar memory."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Masks

# Bytes of scalar memory that one plan may take: every TPU so far has 1 MiB of it.
SCALAR_BYTES = 900_000
# A block is a multiple of this on the chip: the lanes of a vector register.
LANES = 128


@dataclass(frozen=True)
class TpuSizes:
    """The static sizes of a plan; a row is a query block, or a key block for dkv."""

    q_seq_len: int
    kv_seq_len: int
    block_q: int
    block_kv: int
    num_rows: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowList:
    """The rows of one kernel, in one of two forms.

    Run ``j`` is the pair of words ``(2 * start + full, stop)``. Either all runs lie in
    ``runs`` and those of row ``r`` are ``row_ptr[r] : row_ptr[r + 1]`` (all of it in
    scalar memory), or ``table[r, 0]`` holds the count of the row and then its runs (a
    row at a time in scalar memory). The rows of query head ``h`` start at
    ``first_row[h]``, and its test is ``test_of_head[h]``; heads count over all batch
    entries, and both lists repeat every ``len(first_row)`` of them.
    """

    # int32; jax also builds trees of placeholders, so no annotation can say so.
    test_of_head: Any  # [heads]
    first_row: Any  # [heads]
    row_ptr: Any  # [rows + 1] or None
    runs: Any  # [2 * runs] or None
    table: Any  # [rows, 1, 1 + 2 * max_runs] or None
    sizes: TpuSizes = field(metadata={"static": True})


class TpuLists(NamedTuple):
    """The rows of the three kernels."""

    forward: RowList
    dq: RowList
    dkv: RowList


def prepare(masks: Masks, call: Call) -> TpuLists:
    """The run lists of the three kernels; traced plans take the form of a table."""
    if call.interpret is False:
        for name, mask in masks._asdict().items():
            _check_blocks(name, mask)
    return TpuLists(*(_row_list(mask) for mask in masks))


def _check_blocks(name: str, mask: BlockMask) -> None:
    for axis, size in {"block_q": mask.block_q, "block_kv": mask.block_kv}.items():
        if size % LANES:
            raise ValueError(
                f"{name}: {axis}={size} must be a multiple of {LANES} on a TPU, also "
                f"for a shorter sequence (it is padded); use {axis}="
                f"{-(-size // LANES) * LANES}, or interpret=True off the chip"
            )


def _row_list(mask: BlockMask) -> RowList:
    sizes = TpuSizes(
        mask.q_seq_len, mask.kv_seq_len, mask.block_q, mask.block_kv, mask.num_rows
    )
    lists = (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
    static = all(isinstance(x, np.ndarray) for x in (*lists, mask.map_of_head))
    xp: Any = np if static else jnp
    test_of_head = xp.asarray(mask.test_of_head, np.int32)
    first_row = xp.asarray(mask.map_of_head, np.int32) * np.int32(mask.num_rows)
    run_start, run_stop, run_full = (xp.asarray(x, np.int32) for x in lists[1:])
    first = run_start * 2 + (run_full != 0).astype(np.int32)
    words = xp.stack([first, run_stop], axis=-1)
    ptr = xp.asarray(mask.row_ptr, np.int32)
    if static and ptr.nbytes + words.nbytes + 2 * first_row.nbytes <= SCALAR_BYTES:
        # An array of scalar memory cannot be empty.
        runs = words.reshape(-1) if words.size else np.zeros(2, np.int32)
        return RowList(test_of_head, first_row, ptr, runs, None, sizes)
    table = _table(mask, ptr, words, xp)
    return RowList(test_of_head, first_row, None, None, table, sizes)


def _table(mask: BlockMask, ptr: Any, words: Any, xp: Any) -> Any:
    if mask.max_runs < 1 and words.shape[0]:
        raise ValueError(
            "max_runs=0 in a BlockMask with traced runs: give the most runs that a row "
            "can have, which is the room a TPU reserves for each row"
        )
    row_bytes = 4 * (1 + 2 * mask.max_runs)
    if 2 * row_bytes > SCALAR_BYTES:
        raise NotImplementedError(
            f"rows of up to {mask.max_runs} runs do not fit the scalar memory of a TPU "
            f"({SCALAR_BYTES // 16} at most): use larger blocks or another impl"
        )
    count = ptr[1:] - ptr[:-1]
    if not words.shape[0]:
        return count[:, None, None]
    at = ptr[:-1, None] + np.arange(mask.max_runs, dtype=np.int32)[None]
    # What lies past the end of a row is never read; it only has to be an index.
    row = words[xp.minimum(at, words.shape[0] - 1)]
    row = row.reshape(row.shape[0], -1)
    return xp.concatenate([count[:, None], row], axis=1)[:, None]
