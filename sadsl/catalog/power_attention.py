"""PowerAttention: key blocks at power-of-two distances."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window
from sadsl.maps.symbols import power_of_two


def power_attention(block: int = 256, local: int = 5, sink: int = 1) -> IndexMap:
    """A query sees near blocks, first blocks, and those 1, 2, 4, 8, ... blocks back.

    Chen et al., PowerAttention: exponentially scaling of receptive fields for effective
    sparse attention, 2025, section 3. Distances are between blocks, so an offset of
    ``2**p`` tokens is not hit exactly. The paper keeps 2 of every 7 layers dense: use
    ``per_layer`` for that.

    Args:
      block: tokens in a block.
      local: nearest blocks; the own block counts.
      sink: first blocks that are always seen.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.power_attention(1, local=1, sink=0).dense(9)[0].astype(int))
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
    powers = where(lambda q, k: power_of_two(q - k))
    return causal() & (window(local - 1) | powers | sinks(sink)).lift(block)
