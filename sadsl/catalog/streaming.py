"""StreamingLLM: attention sinks and the most recent tokens."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, window


def streaming(num_sinks: int = 4, num_recent: int = 1020) -> IndexMap:
    """The first ``num_sinks`` keys, and the last ``num_recent``, the own one included.

    Xiao et al., Efficient streaming language models with attention sinks, 2023, section
    3.2: caches of 4 + 1020. Positions are rotated within the cache there, which a map
    does not say.
    """
    return causal() & (sinks(num_sinks) | window(num_recent - 1))
