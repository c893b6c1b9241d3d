"""HiP: a tree search for the keys of every block of queries."""

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
    """``mask_k`` keys that a greedy descent finds, and a sliding window.

    Lee et al., A training-free sub-quadratic cost transformer model serving framework
    with hierarchically pruned attention, 2024, section 3; the defaults are the first
    code's. Later versions take query blocks of 64 and 16 sinks.
    """
    return descent(
        mask_k,
        block_q=block_q,
        block_kv=block_kv,
        sliding_window=sliding_window,
        sinks=sinks,
    )
