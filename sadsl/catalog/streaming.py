"""StreamingLLM: attention sinks and the most recent tokens."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, window


def streaming(num_sinks: int = 4, num_recent: int = 1020) -> IndexMap:
    """A query sees the first ``num_sinks`` keys and its last ``num_recent`` keys.

    Xiao et al., Efficient streaming language models with attention sinks, 2023, section
    3.2: caches of 4 + 1020. The paper rotates positions within the cache, which a map
    does not say.

    Args:
      num_sinks: first keys that are always seen.
      num_recent: nearest keys; the query's own position counts.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.streaming(1, 2).dense(6)[0].astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [1 0 1 1 0 0]
       [1 0 0 1 1 0]
       [1 0 0 0 1 1]]
    """
    return causal() & (sinks(num_sinks) | window(num_recent - 1))
