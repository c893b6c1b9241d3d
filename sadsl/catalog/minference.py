"""The vertical-slash heads of MInference, and what its search tries."""

from sadsl.catalog.a_shape import a_shape
from sadsl.maps.base import IndexMap
from sadsl.selections.vertical_slash import vertical_slash


def minference(vertical: int = 1000, slash: int = 6096, *, last: int = 64) -> IndexMap:
    """Columns and offsets with the most attention of the ``last`` queries.

    Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention, 2024, section 3; the defaults are the code's, and so are
    the 30 columns and 100 offsets that are always there and the least budgets of 30 and
    50. The set is the ideal one: a kernel may visit more blocks, never more pairs.
    """
    return vertical_slash(max(vertical, 30), max(slash, 50), last=last)


def minference_candidates() -> tuple[IndexMap, ...]:
    """What the search of the code tries for every head; add block-sparse maps to it.

    Jiang et al., MInference 1.0, 2024, section 3.2: an A-shape of 100 and 800 keys, and
    four vertical-slash maps.
    """
    sizes = (30, 800), (100, 750), (500, 700), (3500, 100)
    return a_shape(100, 800), *(minference(*size) for size in sizes)
