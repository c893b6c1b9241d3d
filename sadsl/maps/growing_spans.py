"""Windows whose size grows with the sequence, one for each head (MoA)."""

from collections.abc import Sequence
from fractions import Fraction

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import causal, sinks, where
from sadsl.maps.symbols import Symbol, Truth, maximum

# alpha and beta are rounded to fractions with at most this denominator.
FINEST = 1 << 12


def moa(
    spans: Sequence[tuple[float, float]], block: int = 64, global_blocks: int = 1
) -> IndexMap:
    """Each head sees its last ``alpha + beta * n`` tokens and the first blocks.

    Fu et al., MoA: mixture of sparse attention for automatic large language model
    compression, 2024, sections 3 and 4. ``n`` is the number of keys, so the map of a
    prefix of a sequence is not a part of the map of the whole. As in the authors' code,
    a span is rounded down to whole blocks, and is at least one block.

    Args:
      spans: ``(alpha, beta)`` of each head, or of each of equal groups of heads. The
        paper finds them offline: alpha in tokens, from ``-n`` to 8192, beta from 0
        to 1.
      block: tokens in a block.
      global_blocks: how many of the first blocks every query sees.

    Example:
      >>> print(moa([(0, 0.5)], block=1).picture(6))
      #.....
      ##....
      ###...
      ####..
      #.###.
      #..###
    """

    def head(alpha: float, beta: float) -> IndexMap:
        a, b = (Fraction(x).limit_denominator(FINEST) for x in (alpha, beta))
        unit = a.denominator * b.denominator

        def near(q: Symbol, k: Symbol, _: Symbol, n: Symbol) -> Truth:
            tokens = n * int(b * unit) + int(a * unit)
            return q // block - k // block < maximum(tokens // (block * unit), 1)

        return causal() & (where(near) | sinks(global_blocks * block))

    return per_head(*(head(alpha, beta) for alpha, beta in spans))
