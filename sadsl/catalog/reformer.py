"""Reformer: buckets of similar tokens, cut into chunks."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal
from sadsl.selections.lsh import lsh, sorted_chunks


def reformer(buckets: int, rounds: int = 8, chunk: int | None = 64) -> IndexMap:
    """Earlier tokens of a bucket, from the own chunk and the one before it.

    Kitaev et al., Reformer, the efficient transformer, 2020, section 2: keys are the
    normalised queries (pass ``k = q / norm(q)``), a token sees itself only if it sees
    no other, and rounds count a key once. The paper's chunks are of ``2 * length /
    buckets`` tokens, on average twice a bucket; ``chunk=None`` keeps buckets whole. The
    directions are the operand ``projections``, floats ``[heads, rounds, head_dim,
    buckets / 2]``.
    """
    chunks = None if chunk is None else sorted_chunks(chunk)
    return causal() & lsh(buckets, rounds, share=True, alone="causal", chunks=chunks)
