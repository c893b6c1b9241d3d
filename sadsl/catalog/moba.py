"""MoBA: mixture of block attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal
from sadsl.selections import topk


def moba(k: int = 3, *, chunk: int = 512) -> IndexMap:
    """The chunk of the query, and those before it with the best mean key: ``k`` in all.

    Lu et al., MoBA: mixture of block attention for long-context LLMs, 2025, section 2;
    chunks of 512 and ``k=3`` are those of its scaling experiments. The own chunk uses
    up one of ``k``. A chunk competes once it is past, so nothing leaks.
    """
    best = topk(k, block=chunk, block_q=1, forced=blocks(chunk), eligible=causal())
    return causal() & best
