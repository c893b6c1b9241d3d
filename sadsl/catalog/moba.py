"""MoBA: mixture of block attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal
from sadsl.selections import topk


def moba(k: int = 3, *, chunk: int = 512) -> IndexMap:
    """A query sees ``k`` chunks: its own, and the past ones with the best mean key.

    Lu et al., MoBA: mixture of block attention for long-context LLMs, 2025, section 2;
    chunks of 512 and ``k=3`` are those of its scaling experiments. A chunk competes
    only once it is past, so nothing leaks.

    Args:
      k: chunks that a query sees, its own included.
      chunk: positions in a chunk.

    Example:
      >>> from sadsl import catalog
      >>> catalog.moba(2, chunk=4)
      causal() & topk(2, block=4, block_q=1, forced=blocks(4), eligible=causal())
    """
    best = topk(k, block=chunk, block_q=1, forced=blocks(chunk), eligible=causal())
    return causal() & best
