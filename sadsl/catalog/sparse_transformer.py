"""The factorised attention of Sparse Transformers."""

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import blocks, causal, strided, where, window


def sparse_transformer_strided(stride: int = 128, *, by_head: bool = True) -> IndexMap:
    """The previous ``stride`` positions, and every ``stride``-th one before.

    Child et al., Generating long sequences with sparse transformers, 2019, section 4.2
    (strided). Half of the heads have either part (the paper's multi-head form); without
    ``by_head`` each sees the union (its merged head).
    """
    parts = (causal() & window(stride), causal() & strided(stride))
    return per_head(*parts) if by_head else parts[0] | parts[1]


def sparse_transformer_fixed(
    stride: int = 128, summary: int = 8, *, by_head: bool = True
) -> IndexMap:
    """The own block, and the last ``summary`` positions of every block before.

    Child et al., 2019, section 4.2 (fixed); the paper recommends blocks of 128 or 256
    and ``summary``, its ``c``, of 8, 16 or 32. Heads as in the strided form.
    """
    summaries = where(lambda q, k: k % stride >= stride - summary)
    parts = (causal() & blocks(stride), causal() & summaries)
    return per_head(*parts) if by_head else parts[0] | parts[1]
