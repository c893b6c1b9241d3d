"""Quest: reads only the pages of a cache that may matter to the query."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal
from sadsl.selections import tokens, topk


def quest(budget: int = 1024, *, page: int = 16) -> IndexMap:
    """A query sees the pages whose keys may score highest: ``budget`` keys in all.

    A page is ranked by an upper bound on its logits, from the least and greatest key in
    each channel. The heads of a group share one choice, by their mean bound. The last
    page is always one of the chosen.

    Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference,
    2024, section 3.3, for decoding; the last page and the mean over a group are as in
    Nawrot et al., The sparse frontier, 2025. Quest leaves its first two layers dense.

    Args:
      budget: keys that a query sees.
      page: keys in a page.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.quest(32, page=8))
      causal() & topk(tokens(32), block=8, block_q=1, score='min_max', scope='group',
      forced=blocks(8), eligible=causal())
    """
    return causal() & topk(
        tokens(budget), block=page, block_q=1, score="min_max", scope="group",
        forced=blocks(page), eligible=causal(),
    )  # fmt: skip
