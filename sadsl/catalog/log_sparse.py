"""LogSparse attention: exponentially growing steps into the past."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal, where, window
from sadsl.maps.symbols import power_of_two


def log_sparse(local: int = 0, restart: int | None = None) -> IndexMap:
    """A position sees itself and those 1, 2, 4, 8, ... before it.

    Li et al., Enhancing the locality and breaking the memory bottleneck of transformer
    on time series forecasting, 2019, section 4.2. ``local`` adds the nearest keys
    before the query, and ``restart`` cuts the sequence into parts of that length; the
    paper has both as variants. Steps are counted from the query with ``local`` keys,
    too.
    """
    spec = window(local) | where(lambda q, k: power_of_two(q - k))
    spec = causal() & spec if local else spec
    return spec if restart is None else spec & blocks(restart)
