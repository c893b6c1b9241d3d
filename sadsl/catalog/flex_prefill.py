"""FlexPrefill in the form of The Sparse Frontier: budgets are shares of attention."""

from sadsl.maps.base import IndexMap
from sadsl.selections.vertical_slash import vertical_slash_mass


def flex_prefill(
    alpha: float = 0.65, *, last: int = 512, min_budget: int = 512
) -> IndexMap:
    """Each head sees the columns and offsets that hold ``alpha`` of the attention.

    A column is a key, an offset is a distance between query and key. Columns, and
    offsets, are ranked by the attention of the last queries.

    Lai et al., FlexPrefill: a context-aware sparse attention mechanism for efficient
    long-sequence inference, 2025, as in Nawrot et al., The sparse frontier: sparse
    attention trade-offs in transformer LLMs, 2025, whose defaults these are: the
    vertical-slash branch alone, with 4 columns and 64 offsets that are always there.

    Args:
      alpha: share of the attention to keep, from 0 to 1.
      last: last queries that the estimate is made from.
      min_budget: columns, and offsets, to keep at least.

    Example:
      >>> from sadsl import catalog
      >>> catalog.flex_prefill(0.9)
      vertical_slash_mass(0.9)
    """
    return vertical_slash_mass(alpha, last=last, least=min_budget)
