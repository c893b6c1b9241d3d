"""The factorised attention of Sparse Transformers."""

from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import blocks, causal, strided, where, window


def sparse_transformer_strided(stride: int = 128, *, by_head: bool = True) -> IndexMap:
    """A query sees the previous ``stride`` keys, and every ``stride``-th key before it.

    Child et al., Generating long sequences with sparse transformers, 2019, section 4.2
    (strided).

    Args:
      stride: in tokens.
      by_head: half of the heads have either part (the paper's multi-head form); if
        False, each head has both (its merged head).

    Example:
      >>> from sadsl import catalog
      >>> near, far = catalog.sparse_transformer_strided(3).dense(6, num_heads=2)
      >>> print(near.astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [1 1 1 1 0 0]
       [0 1 1 1 1 0]
       [0 0 1 1 1 1]]
      >>> print(far.astype(int))
      [[1 0 0 0 0 0]
       [0 1 0 0 0 0]
       [0 0 1 0 0 0]
       [1 0 0 1 0 0]
       [0 1 0 0 1 0]
       [0 0 1 0 0 1]]
    """
    parts = (causal() & window(stride), causal() & strided(stride))
    return per_head(*parts) if by_head else parts[0] | parts[1]


def sparse_transformer_fixed(
    stride: int = 128, summary: int = 8, *, by_head: bool = True
) -> IndexMap:
    """A query sees its own block, and the last ``summary`` keys of every block before.

    Child et al., Generating long sequences with sparse transformers, 2019, section 4.2
    (fixed). The paper recommends blocks of 128 or 256.

    Args:
      stride: tokens in a block.
      summary: last keys of a block that later queries see; the paper's ``c``, for which
        it recommends 8, 16 or 32.
      by_head: as in the strided form.

    Example:
      >>> from sadsl import catalog
      >>> spec = catalog.sparse_transformer_fixed(3, summary=1, by_head=False)
      >>> print(spec.dense(6)[0].astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [0 0 1 1 0 0]
       [0 0 1 1 1 0]
       [0 0 1 1 1 1]]
    """
    summaries = where(lambda q, k: k % stride >= stride - summary)
    parts = (causal() & blocks(stride), causal() & summaries)
    return per_head(*parts) if by_head else parts[0] | parts[1]
