"""Quest: the pages of a cache that may matter to the query at hand."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal
from sadsl.selections import tokens, topk


def quest(budget: int = 1024, *, page: int = 16) -> IndexMap:
    """The pages with the greatest bound on a logit: ``budget`` keys of them.

    Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference,
    2024, section 3.3, for decoding; the heads of a group choose as one, by their mean
    bound, and the last page is always one of the chosen (Nawrot et al., The sparse
    frontier, 2025). Quest leaves its first two layers dense.
    """
    return causal() & topk(
        tokens(budget), block=page, block_q=1, score="min_max", scope="group",
        forced=blocks(page), eligible=causal(),
    )  # fmt: skip
