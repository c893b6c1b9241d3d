"""The block-sparse heads of MInference."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal
from sadsl.selections import topk


def block_sparse(k: int = 100, *, block: int = 64) -> IndexMap:
    """For a block of queries the ``k`` blocks of keys with the best mean score.

    Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention, 2024, section 3.2 and algorithm 3. The block of the query
    is not forced: a query may see old blocks only.
    """
    return causal() & topk(k, block=block, eligible=causal())
