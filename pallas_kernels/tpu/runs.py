"""Converts block masks to the run lists that TPU kernels read from scalar memory."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call

# The bytes of scalar memory that one plan may use. Every TPU so far has 1 MiB.
SCALAR_BYTES = 900_000
# The lanes of a vector register. On the chip, a block is a multiple of this.
LANES = 128
# The rows of a tile of 16-bit numbers. A block of all rows is a multiple of this.
SUBLANES = 16


@dataclass(frozen=True)
class TpuSizes:
    """The static sizes of a plan. A row is a query block, or a key block for dkv."""

    q_seq_len: int
    kv_seq_len: int
    block_q: int
    block_kv: int
    num_rows: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TpuPlan:
    """The runs of one kernel, in one of two forms.

    A run is the pair of words ``(2 * start + full, stop)``.

    - List: ``runs`` has the words of all runs. Those of row ``r`` are runs ``row_ptr[r]
      : row_ptr[r + 1]``. Scalar memory holds the whole list.
    - Table: ``table[r, 0]`` is the number of runs of row ``r``, followed by their
      words. Scalar memory holds one row at a time.

    Query head ``h`` has the rows from ``first_row[h]`` on and the test
    ``test_of_head[h]``. Heads are counted over all batch entries, and both arrays
    repeat with period ``len(first_row)``.
    """

    # int32. Any, because jax rebuilds a pytree with placeholders in it.
    test_of_head: Any  # [heads]
    first_row: Any  # [heads]
    row_ptr: Any  # [rows + 1] or None
    runs: Any  # [2 * runs] or None
    table: Any  # [rows, 1, 1 + 2 * max_runs] or None
    sizes: TpuSizes = field(metadata={"static": True})


def plan_of_rows(mask: BlockMask, call: Call) -> TpuPlan:
    """The plan of a forward kernel whose rows may be one block of fewer than LANES.

    Raises:
      ValueError: a block size that the chip does not support.
      NotImplementedError: the runs of one row do not fit scalar memory.
    """
    if call.interpret is False:
        one = mask.num_rows == 1 and mask.block_q % SUBLANES == 0
        check_blocks("forward", replace(mask, block_q=LANES) if one else mask)
    return plan(mask)


def check_blocks(name: str, mask: BlockMask) -> None:
    """Refuses blocks that are not whole registers.

    Raises:
      ValueError: a block size that the chip does not support.
    """
    for axis, size in {"block_q": mask.block_q, "block_kv": mask.block_kv}.items():
        if size % LANES:
            raise ValueError(
                f"{name}: {axis}={size} must be a multiple of {LANES} on a TPU, also "
                f"for a shorter sequence (it is padded); use {axis}="
                f"{-(-size // LANES) * LANES}, or interpret=True off the chip"
            )


def sizes_of(mask: BlockMask) -> TpuSizes:
    """The static sizes of a mask."""
    return TpuSizes(
        mask.q_seq_len, mask.kv_seq_len, mask.block_q, mask.block_kv, mask.num_rows
    )


def is_static(mask: BlockMask) -> bool:
    """Whether all arrays of a mask are known when the call is traced."""
    arrays = (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
    return all(isinstance(x, np.ndarray) for x in (*arrays, mask.map_of_head))


def plan(mask: BlockMask) -> TpuPlan:
    """The plan of a kernel with the rows of ``mask``. A traced plan is a table.

    Raises:
      ValueError: a traced mask without ``max_runs``.
      NotImplementedError: the runs of one row do not fit scalar memory.
    """
    xp: Any = np if is_static(mask) else jnp
    test_of_head, first_row = _heads(mask, xp)
    words = _words(mask, xp)
    ptr = xp.asarray(mask.row_ptr, np.int32)
    size = ptr.nbytes + words.nbytes + 2 * first_row.nbytes
    if not is_static(mask) or size > SCALAR_BYTES:
        return table_plan(mask)
    # An array in scalar memory cannot be empty.
    runs = words.reshape(-1) if words.size else np.zeros(2, np.int32)
    return TpuPlan(test_of_head, first_row, ptr, runs, None, sizes_of(mask))


def table_plan(mask: BlockMask) -> TpuPlan:
    """``plan`` as a table.

    Raises:
      ValueError, NotImplementedError: as ``plan``.
    """
    xp: Any = np if is_static(mask) else jnp
    ptr = xp.asarray(mask.row_ptr, np.int32)
    table = _table(mask, ptr, _words(mask, xp), xp)
    return TpuPlan(*_heads(mask, xp), None, None, table, sizes_of(mask))


def _heads(mask: BlockMask, xp: Any) -> tuple[Any, Any]:
    """``TpuPlan.test_of_head`` and ``first_row``."""
    first_row = xp.asarray(mask.map_of_head, np.int32) * np.int32(mask.num_rows)
    return xp.asarray(mask.test_of_head, np.int32), first_row


def _words(mask: BlockMask, xp: Any) -> Any:
    """The two words of each run, ``[runs, 2]``."""
    arrays = (mask.run_start, mask.run_stop, mask.run_full)
    run_start, run_stop, run_full = (xp.asarray(x, np.int32) for x in arrays)
    first = run_start * 2 + (run_full != 0).astype(np.int32)
    return xp.stack([first, run_stop], axis=-1)


def _table(mask: BlockMask, ptr: Any, words: Any, xp: Any) -> Any:
    if mask.max_runs < 1 and words.shape[0]:
        raise ValueError(
            "max_runs=0 in a BlockMask with traced runs: a TPU reserves memory for "
            "max_runs runs in each row; give the largest number that a row can have"
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
    # Entries past the end of a row are never read, but their index must be valid.
    row = words[xp.minimum(at, words.shape[0] - 1)]
    row = row.reshape(row.shape[0], -1)
    return xp.concatenate([count[:, None], row], axis=1)[:, None]
