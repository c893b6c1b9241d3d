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
    """A query sees near keys, first keys, and a strided lattice in the vision span.

    Li et al., MMInference: accelerating pre-filling for long-context VLMs via
    modality-aware permutation sparse attention, 2025, section 3; 1024 local tokens and
    blocks of 64 are the code's. Lattice positions are congruent to the start, as in the
    kernel (the code's own test has them one earlier). Sink, local and the lattice's
    zone round to blocks, and what follows the zone is dense. Where the span is too
    short for one period, everything is causal.

    Args:
      vision: start and stop of the vision span, in positions.
      stride: positions between lattice rows, and between lattice columns.
      sink: first keys that are always seen; at least those before the span.
      local: nearest keys that are always seen.
      block: positions that sizes round to.

    Example:
      >>> from sadsl import catalog
      >>> spec = catalog.mminference_grid((0, 12), 3, local=1, block=1)
      >>> print(spec.dense(12)[0].astype(int))
      [[1 0 0 0 0 0 0 0 0 0 0 0]
       [1 1 0 0 0 0 0 0 0 0 0 0]
       [1 0 1 0 0 0 0 0 0 0 0 0]
       [1 1 1 1 0 0 0 0 0 0 0 0]
       [1 0 0 1 1 0 0 0 0 0 0 0]
       [1 0 0 1 0 1 0 0 0 0 0 0]
       [1 1 1 1 1 1 1 0 0 0 0 0]
       [1 0 0 1 0 0 1 1 0 0 0 0]
       [1 0 0 1 0 0 1 0 1 0 0 0]
       [1 1 1 1 1 1 1 1 1 1 0 0]
       [1 1 1 1 1 1 1 1 1 1 1 0]
       [1 1 1 1 1 1 1 1 1 1 1 1]]
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
    """Sorts the positions of ``span`` in map ``a`` by residue modulo ``stride``.

    This is the permutation of MMInference: position ``p`` of the result is ``order[p]``
    of ``a``. The span's positions ``start, start + stride, ...`` come first, then those
    from ``start + 1``, and so on. A lattice of that stride becomes contiguous rows and
    columns.

    Args:
      a: the map to reorder.
      span: start and stop, in positions.
      stride: positions between members of a residue class.
      num_positions: length of the whole sequence.

    Example:
      >>> import sadsl as sa
      >>> from sadsl import catalog
      >>> spec = catalog.residue_major(sa.strided(2), (0, 6), 2, 6)
      >>> print(spec.dense(6)[0].astype(int))
      [[1 1 1 0 0 0]
       [1 1 1 0 0 0]
       [1 1 1 0 0 0]
       [0 0 0 1 1 1]
       [0 0 0 1 1 1]
       [0 0 0 1 1 1]]
    """
    start, stop = span
    classes = (range(start + r, stop, stride) for r in range(stride))
    inside = (position for residue in classes for position in residue)
    return a.permute([*range(start), *inside, *range(stop, num_positions)])
