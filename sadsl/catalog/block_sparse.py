"""The block-sparse heads of MInference."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal
from sadsl.selections import topk


def block_sparse(k: int = 100, *, block: int = 64) -> IndexMap:
    """Each block of queries sees the ``k`` blocks of keys with the best mean score.

    Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention, 2024, section 3.2 and algorithm 3. The query's own block
    is not forced: a query may see older blocks only.

    Args:
      k: key blocks for each query block.
      block: positions in a block of queries and in a block of keys.

    Example:
      >>> from sadsl import catalog
      >>> catalog.block_sparse(2, block=4)
      causal() & topk(2, block=4, eligible=causal())
    """
    return causal() & topk(k, block=block, eligible=causal())
