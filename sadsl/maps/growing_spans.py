"""Maps whose spans grow with the length, by head: MoA."""

from collections.abc import Sequence
from fractions import Fraction

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import causal, sinks, where
from sadsl.maps.symbols import Symbol, Truth, maximum

# A slope is read as the nearest fraction with at most this denominator.
FINEST = 1 << 12


def moa(
    spans: Sequence[tuple[float, float]], block: int = 64, global_blocks: int = 1
) -> IndexMap:
    """Head ``h`` sees the last ``alpha + beta * n`` tokens, and the first block.

    Fu et al., MoA: mixture of sparse attention for automatic large language model
    compression, 2024, sections 3 and 4; ``spans`` are the ``(alpha, beta)`` of every
    head (or equal head group), which the paper finds offline: alpha in tokens, from
    ``-n`` to 8192, beta from 0 to 1. As in its code, spans round down to blocks, but
    never below one; ``n`` is the number of keys, so that the mask of a prefix is not
    the prefix of the mask.
    """

    def head(alpha: float, beta: float) -> IndexMap:
        a, b = (Fraction(x).limit_denominator(FINEST) for x in (alpha, beta))
        unit = a.denominator * b.denominator

        def near(q: Symbol, k: Symbol, _: Symbol, n: Symbol) -> Truth:
            tokens = n * int(b * unit) + int(a * unit)
            return q // block - k // block < maximum(tokens // (block * unit), 1)

        return causal() & (where(near) | sinks(global_blocks * block))

    return per_head(*(head(alpha, beta) for alpha, beta in spans))
