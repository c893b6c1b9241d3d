"""What the loops of this backend walk: rows of blocks, padded to equal shapes."""

from dataclasses import dataclass, field
from typing import Any

import jax

# Arrays are annotated Any: JAX unflattens these classes with leaves of every kind.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Short:
    """Rows that are folded in one go, each its full blocks first, then its partial.

    A row has ``num_full`` real blocks in the first ``full_slots`` columns and
    ``num_partial`` in the others. Padding repeats a block of the same row: a block
    that the row does not visit is never read.
    """

    row: Any  # int32 [rows]
    block: Any  # int32 [rows, slots]
    num_full: Any  # int32 [rows]
    num_partial: Any  # int32 [rows]
    full_slots: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """Blocks of one kind, some at a time: row ``i`` has chunks ``begin[i]:end[i]``.

    The first ``count`` blocks of a chunk are real; padding repeats the last of them.
    """

    block: Any  # int32 [chunks, slots]
    count: Any  # int32 [chunks]
    begin: Any  # int32 [rows]
    end: Any  # int32 [rows]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Long:
    """Rows that are folded chunk by chunk, the full blocks apart from the partial."""

    row: Any  # int32 [rows]
    full: Chunks
    partial: Chunks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Walk:
    """The rows of one map; a row in none of the parts is empty."""

    short: tuple[Short, ...]
    long: Long | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class XlaPlan:
    """The walks of all maps and the block sizes they count in.

    Traced walks are one, with a leading axis of maps on every array.
    """

    walks: tuple[Walk, ...]
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class XlaLists:
    """Query rows for the forward pass, and for all three gradients of the backward."""

    forward: XlaPlan
    backward: XlaPlan
    map_of_head: tuple[int, ...] = field(metadata={"static": True})
    test_of_map: tuple[int, ...] = field(metadata={"static": True})
