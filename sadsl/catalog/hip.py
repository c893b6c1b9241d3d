"""HiP: a tree search finds the keys of each block of queries."""

from sadsl.maps.base import IndexMap
from sadsl.selections.descent import descent


def hip(
    mask_k: int = 512,
    *,
    block_q: int = 32,
    block_kv: int = 2,
    sliding_window: int = 256,
    sinks: int = 0,
) -> IndexMap:
    """Each block of queries sees ``mask_k`` keys of a greedy tree search, and a window.

    Lee et al., A training-free sub-quadratic cost transformer model serving framework
    with hierarchically pruned attention, 2024, section 3. The defaults are the first
    code's. Later versions use query blocks of 64 and 16 sinks.

    Args:
      mask_k: keys that the search keeps.
      block_q, block_kv: positions in a block of queries and in a block of keys.
      sliding_window: nearest keys that are always seen.
      sinks: first keys that are always seen.

    Example:
      >>> from sadsl import catalog
      >>> catalog.hip(64, sinks=4)
      descent(mask_k=64, sinks=4)
    """
    return descent(
        mask_k,
        block_q=block_q,
        block_kv=block_kv,
        sliding_window=sliding_window,
        sinks=sinks,
    )
