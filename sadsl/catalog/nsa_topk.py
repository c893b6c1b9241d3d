"""The selected blocks of native sparse attention."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where
from sadsl.selections import attended, scored, topk
from sadsl.selections.cell_scores import Score


def nsa_topk(
    k: int = 16, *, block: int = 64, first: int = 1, local: int = 2,
    score: Score | str | None = None,
) -> IndexMap:  # fmt: skip
    """A query sees ``k`` blocks: the first, the nearest, and the best others.

    Yuan et al., Native sparse attention: hardware-aligned and natively trainable sparse
    attention, 2025, section 3.3.2. Blocks rank by the attention that the query pays to
    their compressed keys, added up over the heads of a group, which share one choice.
    This is one of the three gated branches of ``native_sparse_attention``.

    Args:
      k: blocks that a query sees, forced ones included.
      block: positions in a block.
      first: first blocks that are always seen.
      local: nearest blocks that are always seen; the own block counts.
      score: how blocks are scored, as ``attended`` makes it, or the name of an operand
        with scores. None: by the mean keys of whole past blocks.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.nsa_topk(4, block=8, score="importance"))
      causal() & topk(4, block=8, block_q=1, score='importance', scope='group',
      forced=sinks(8) | where(lambda q, k: (q // 8 - k // 8 <= 1) & (k <= q)),
      eligible=causal())
    """
    near = where(lambda q, k: (q // block - k // block < local) & (k <= q))
    chosen_by = scored(attended(block, block)) if score is None else score
    best = topk(
        k, block=block, block_q=1, score=chosen_by,
        scope="group", forced=sinks(first * block) | near, eligible=causal(),
    )  # fmt: skip
    return causal() & best
