"""Reformer: buckets of similar tokens, cut into chunks."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal
from sadsl.selections.lsh import lsh, sorted_chunks


def reformer(buckets: int, rounds: int = 8, chunk: int | None = 64) -> IndexMap:
    """A query sees the earlier keys of its bucket in its own chunk and the one before.

    Kitaev et al., Reformer, the efficient transformer, 2020, section 2. Keys are the
    normalised queries: pass ``k = q / norm(q)``. A token sees itself only if it sees no
    other. A key that several rounds find counts once. The paper's chunks are of ``2 *
    length / buckets`` tokens, on average twice a bucket.

    The hash directions are the operand ``projections``, floats ``[heads, rounds,
    head_dim, buckets / 2]``.

    Args:
      buckets: hash buckets, an even number.
      rounds: independent hashes, whose keys are united.
      chunk: tokens in a chunk; None keeps buckets whole.

    Example:
      >>> from sadsl import catalog
      >>> catalog.reformer(8, rounds=2, chunk=16)
      causal() & lsh(8, rounds=2, share=True, alone='causal', chunks=sorted_chunks(16))
    """
    chunks = None if chunk is None else sorted_chunks(chunk)
    return causal() & lsh(buckets, rounds, share=True, alone="causal", chunks=chunks)
