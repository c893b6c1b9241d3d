"""The vertical-slash heads of MInference, and the candidates of its search."""

from sadsl.catalog.a_shape import a_shape
from sadsl.maps.base import IndexMap
from sadsl.selections.vertical_slash import vertical_slash


def minference(vertical: int = 1000, slash: int = 6096, *, last: int = 64) -> IndexMap:
    """A query sees the columns and the offsets with the most attention.

    A column is a key, an offset is a distance between query and key. Both are ranked by
    the attention of the ``last`` queries.

    Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention, 2024, section 3. The defaults are the code's, and so are
    the 30 columns and 100 offsets that are always there, and the least budgets of 30
    and 50. The set is the ideal one: a kernel may visit more blocks, never more pairs.

    Args:
      vertical: columns to keep, at least 30.
      slash: offsets to keep, at least 50.
      last: last queries that the ranking is made from.

    Example:
      >>> from sadsl import catalog
      >>> catalog.minference(100, 750)
      vertical_slash(100, 750)
    """
    return vertical_slash(max(vertical, 30), max(slash, 50), last=last)


def minference_candidates() -> tuple[IndexMap, ...]:
    """The maps that MInference's search tries for every head, but block-sparse ones.

    Jiang et al., MInference 1.0, 2024, section 3.2: an A-shape of 100 and 800 keys, and
    four vertical-slash maps.

    Example:
      >>> from sadsl import catalog
      >>> for spec in catalog.minference_candidates():
      ...     print(spec)
      causal() & (sinks(100) | window(799))
      vertical_slash(30, 800)
      vertical_slash(100, 750)
      vertical_slash(500, 700)
      vertical_slash(3500, 100)
    """
    sizes = (30, 800), (100, 750), (500, 700), (3500, 100)
    return a_shape(100, 800), *(minference(*size) for size in sizes)
