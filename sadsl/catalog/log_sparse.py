"""LogSparse attention: exponentially growing steps into the past."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal, where, window
from sadsl.maps.symbols import power_of_two


def log_sparse(local: int = 0, restart: int | None = None) -> IndexMap:
    """A query sees itself and the keys 1, 2, 4, 8, ... positions before it.

    Li et al., Enhancing the locality and breaking the memory bottleneck of transformer
    on time series forecasting, 2019, section 4.2. The paper has ``local`` and
    ``restart`` as variants.

    Args:
      local: nearest keys before the query that are seen as well. Steps are still
        counted from the query.
      restart: cuts the sequence into parts of this length, which do not see each other.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.log_sparse().dense(9)[0].astype(int))
      [[1 0 0 0 0 0 0 0 0]
       [1 1 0 0 0 0 0 0 0]
       [1 1 1 0 0 0 0 0 0]
       [0 1 1 1 0 0 0 0 0]
       [1 0 1 1 1 0 0 0 0]
       [0 1 0 1 1 1 0 0 0]
       [0 0 1 0 1 1 1 0 0]
       [0 0 0 1 0 1 1 1 0]
       [1 0 0 0 1 0 1 1 1]]
    """
    spec = window(local) | where(lambda q, k: power_of_two(q - k))
    spec = causal() & spec if local else spec
    return spec if restart is None else spec & blocks(restart)
