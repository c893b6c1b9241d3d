"""DHSA: chunks of any length compete for a budget of tokens."""

from sadsl.maps.base import IndexMap
from sadsl.selections.chunk_budget import chunk_budget


def dhsa(
    budget: int = 1024, *, first: int = 128, local: int = 64, by_block: bool = False
) -> IndexMap:
    """A query sees ``budget`` keys, from the chunks that its block ranks highest.

    A block is 128 queries.

    Xiong et al., Long-context modeling with dynamic hierarchical sparse attention for
    on-device LLMs, 2025, section 3. The defaults are the first code's. Pass
    ``operands={"boundaries": flags [length]}``, as ``teacher_boundaries(q, k)`` or a
    predictor finds them.

    Args:
      budget: keys that a query sees.
      first: first keys that are always seen.
      local: nearest keys that are always seen.
      by_block: counts the budget and the local keys from the end of the query block, as
        that code does.

    Example:
      >>> from sadsl import catalog
      >>> catalog.dhsa(32, first=4, local=4)
      chunk_budget(32, first=4, local=4)
    """
    return chunk_budget(budget, first=first, local=local, by_block=by_block)
