"""The form in which the XLA backend stores a plan: rows of blocks in padded tables.

A ``Walk`` lists the blocks of each row of one map. Rows of similar length share a
table, and a table is padded so that a scan can loop over its rows.
"""

from dataclasses import dataclass, field
from typing import Any

import jax

# Arrays are annotated Any, because JAX unflattens these classes with other leaves too.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Short:
    """Rows whose blocks are all processed in one step.

    A row has ``num_full`` full blocks in the first ``full_slots`` columns, and
    ``num_partial`` partial blocks in the others. Padding repeats a block of the same
    row, so that a block that the row does not visit is never read.
    """

    row: Any  # int32 [rows]
    block: Any  # int32 [rows, slots]
    num_full: Any  # int32 [rows]
    num_partial: Any  # int32 [rows]
    full_slots: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """Blocks of one kind in chunks of ``slots``: row ``i`` has ``begin[i]:end[i]``.

    The first ``count`` blocks of a chunk are real. Padding repeats the last of them.
    """

    block: Any  # int32 [chunks, slots]
    count: Any  # int32 [chunks]
    begin: Any  # int32 [rows]
    end: Any  # int32 [rows]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Long:
    """Rows that are processed in chunks, first full and then partial blocks."""

    row: Any  # int32 [rows]
    full: Chunks
    partial: Chunks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Walk:
    """The rows of one map. A row that is in no part is empty."""

    short: tuple[Short, ...]
    long: Long | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class XlaPlan:
    """The walks of all maps, and their block sizes.

    Traced walks are a single ``Walk`` whose arrays have a leading axis of maps.
    """

    walks: tuple[Walk, ...]
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class XlaLists:
    """The plans of a call, both with rows of queries.

    ``backward`` serves all three gradients.
    """

    forward: XlaPlan
    backward: XlaPlan
    map_of_head: tuple[int, ...] = field(metadata={"static": True})
    test_of_map: tuple[int, ...] = field(metadata={"static": True})
