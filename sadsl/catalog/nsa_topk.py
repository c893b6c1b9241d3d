"""The selected blocks of native sparse attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where
from sadsl.selections import scored, topk
from sadsl.selections.cell_scores import Score

# Blocks compete by their mean keys once they are whole.
MEAN_KEYS = scored("mean", normalise="whole_softmax")


def nsa_topk(
    k: int = 16, *, block: int = 64, first: int = 1, local: int = 2,
    score: Score | str = MEAN_KEYS,
) -> IndexMap:  # fmt: skip
    """The first block, the last ones, and the best by compressed scores: ``k`` in all.

    After Yuan et al., Native sparse attention: hardware-aligned and natively trainable
    sparse attention, 2025, section 3.3.2. A query's softmax over the mean keys of whole
    past blocks is averaged over the heads of a group, which choose as one. There, keys
    are compressed by a learned map over overlapping blocks: ``score`` may name an
    operand of such scores, which ``nsa_importance`` makes. This is one of the three
    gated branches of ``native_sparse_attention``.
    """
    near = where(lambda q, k: (q // block - k // block < local) & (k <= q))
    best = topk(
        k, block=block, block_q=1, score=score,
        scope="group", forced=sinks(first * block) | near, eligible=causal(),
    )  # fmt: skip
    return causal() & best
