"""The selected blocks of native sparse attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where
from sadsl.selections import scored, topk
from sadsl.selections.cell_scores import Score

# A block competes by its mean key once all of its keys are past.
MEAN_KEYS = scored("mean", normalise="whole_softmax")


def nsa_topk(
    k: int = 16, *, block: int = 64, first: int = 1, local: int = 2,
    score: Score | str = MEAN_KEYS,
) -> IndexMap:  # fmt: skip
    """A query sees ``k`` blocks: the first, the nearest, and the best others.

    After Yuan et al., Native sparse attention: hardware-aligned and natively trainable
    sparse attention, 2025, section 3.3.2. A query's softmax over the mean keys of whole
    past blocks is averaged over the heads of a group, which share one choice. In the
    paper, a learned map compresses the keys of overlapping blocks. This is one of the
    three gated branches of ``native_sparse_attention``.

    Args:
      k: blocks that a query sees, forced ones included.
      block: positions in a block.
      first: first blocks that are always seen.
      local: nearest blocks that are always seen; the own block counts.
      score: how blocks are scored, or the name of an operand with scores, such as
        ``nsa_importance`` makes.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.nsa_topk(4, block=8, score="importance"))
      causal() & topk(4, block=8, block_q=1, score='importance', scope='group',
      forced=sinks(8) | where(lambda q, k: (q // 8 - k // 8 <= 1) & (k <= q)),
      eligible=causal())
    """
    near = where(lambda q, k: (q // block - k // block < local) & (k <= q))
    best = topk(
        k, block=block, block_q=1, score=score,
        scope="group", forced=sinks(first * block) | near, eligible=causal(),
    )  # fmt: skip
    return causal() & best
