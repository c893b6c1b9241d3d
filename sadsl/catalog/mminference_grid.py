"""The grid heads of MMInference, and the order in which their lattice is contiguous."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window
from sadsl.maps.symbols import Symbol, Truth


def mminference_grid(
    vision: tuple[int, int],
    stride: int,
    *,
    sink: int = 0,
    local: int = 1024,
    block: int = 64,
) -> IndexMap:
    """Rows and columns of every ``stride``-th position of the ``vision`` span.

    Li et al., MMInference: accelerating pre-filling for long-context VLMs via
    modality-aware permutation sparse attention, 2025, section 3; 1024 local tokens and
    blocks of 64 are the code's. ``vision`` is (start, stop); sink, local and the
    lattice's zone round to blocks, and what follows the zone is dense. Lattice
    positions are congruent to the start, as in the kernel (the code's own test has them
    one earlier). Where the span is too short for one period, everything is causal.
    """
    start, stop = vision
    sink = -(-max(sink, start) // block) * block
    local = -(-local // block) * block
    period = block * stride
    if start + period + local > stop:
        return causal()
    zone = max(0, (stop - sink - local) // period * period)

    def lattice(at: Symbol, first: int) -> Truth:
        return (at >= first) & (at < first + zone) & ((at - start) % stride == 0)

    rows = where(lambda q, k: lattice(q, sink + local) | (q >= sink + local + zone))
    columns = where(lambda q, k: lattice(k, sink))
    return causal() & (window(local - 1) | sinks(sink) | rows | columns)


def residue_major(
    a: IndexMap, span: tuple[int, int], stride: int, num_positions: int
) -> IndexMap:
    """``a`` with the positions of ``span`` sorted by residue modulo ``stride``.

    The permutation of MMInference: position ``p`` of the result is ``order[p]`` of
    ``a``, first those ``stride`` apart from the start of the span, then those from the
    next on. A lattice of that stride becomes contiguous rows and columns.
    """
    start, stop = span
    classes = (range(start + r, stop, stride) for r in range(stride))
    inside = (position for residue in classes for position in residue)
    return a.permute([*range(start), *inside, *range(stop, num_positions)])
