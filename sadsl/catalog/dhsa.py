"""DHSA: chunks of any length compete for a budget of tokens."""

from sadsl.maps.base import IndexMap
from sadsl.selections.chunk_budget import chunk_budget


def dhsa(
    budget: int = 1024, *, first: int = 128, local: int = 64, by_block: bool = False
) -> IndexMap:
    """Keys by chunk, those of the chunks that a block of 128 queries ranks highest.

    Xiong et al., Long-context modeling with dynamic hierarchical sparse attention for
    on-device LLMs, 2025, section 3; the defaults are the first code's. Pass
    ``operands={"boundaries": flags [length]}``, as ``teacher_boundaries(q, k)`` or a
    predictor finds them. ``by_block`` counts from the end of the query block, as in
    that code.
    """
    return chunk_budget(budget, first=first, local=local, by_block=by_block)
