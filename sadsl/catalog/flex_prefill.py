"""FlexPrefill in the form of The Sparse Frontier: budgets by mass, head by head."""

from sadsl.maps.base import IndexMap
from sadsl.selections.vertical_slash import vertical_slash_mass


def flex_prefill(
    alpha: float = 0.65, *, last: int = 512, min_budget: int = 512
) -> IndexMap:
    """Columns and offsets that together hold ``alpha`` of the last queries' attention.

    Lai et al., FlexPrefill: a context-aware sparse attention mechanism for efficient
    long-sequence inference, 2025, as in Nawrot et al., The sparse frontier: sparse
    attention trade-offs in transformer LLMs, 2025, whose defaults these are: the
    vertical-slash branch alone, with 4 columns and 64 offsets that are always there.
    """
    return vertical_slash_mass(alpha, last=last, least=min_budget)
