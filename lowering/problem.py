"""The sizes of an attention call: sequence lengths, heads, offset of the queries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """The sizes that a map is lowered for; query ``i`` is at ``q_offset + i``."""

    q_seq_len: int
    kv_seq_len: int
    num_heads: int = 1
    q_offset: int = 0
