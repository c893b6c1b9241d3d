"""PowerAttention: key blocks at power-of-two distances."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window
from sadsl.maps.symbols import power_of_two


def power_attention(block: int = 256, local: int = 5, sink: int = 1) -> IndexMap:
    """Own and near blocks, the first, and those 1, 2, 4, 8, ... blocks back.

    Chen et al., PowerAttention: exponentially scaling of receptive fields for effective
    sparse attention, 2025, section 3. Distances are between blocks, so that an offset
    of 2**p tokens is not hit exactly. ``local`` and ``sink`` count blocks of ``block``
    tokens; ``local`` includes the own block. The paper keeps 2 of every 7 layers dense,
    which is for the model to do.
    """
    powers = where(lambda q, k: power_of_two(q - k))
    return causal() & (window(local - 1) | powers | sinks(sink)).lift(block)
