"""SparseD: one choice of blocks that serves many denoising steps."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import where
from sadsl.selections import scored, share, topk


def sparsed(
    ratio: float = 0.3,
    *,
    block: int = 128,
    new_tokens: int = 0,
    scale: float | None = None,
) -> IndexMap:
    """Each block of queries sees the blocks of keys that hold most of its attention.

    Wang et al., SparseD: sparse attention for diffusion language models, 2025, section
    4. ``sadsl.select`` at step ``plan_step`` makes the choice; pass what it returns as
    ``operands`` in later steps.

    Keys before the last ``new_tokens``, and those of the last ones, are chosen apart:
    ``floor(blocks * ratio) + 1`` blocks each. The first choice is among all keys, and
    then loses the new ones.

    Args:
      ratio: share of the blocks that a block of queries sees.
      block: positions in a block.
      new_tokens: last tokens, which are being generated.
      scale: factor of the scores that choose; ``sm_scale`` if None. The code has
        ``num_heads ** -0.5``.

    Example:
      >>> from sadsl import catalog
      >>> catalog.sparsed(0.5, block=16)
      topk(share(0.5, plus=1), block=16, score='attention')
    """
    score = scored("attention", scale=scale)
    best = topk(share(ratio, plus=1), block=block, score=score)
    if new_tokens == 0:
        return best
    new = where(
        lambda q, k, h, n: k // block >= (n + (block - 1 - new_tokens)) // block
    )
    budget = share(ratio, plus=1, of="eligible")
    return (best - new) | topk(budget, block=block, score=score, eligible=new)


def plan_step(num_steps: int, skip: float = 0.2) -> int:
    """The step in which SparseD makes its choice. Steps up to it are dense.

    Args:
      num_steps: denoising steps in all.
      skip: share of the steps that are dense.

    Raises:
      ValueError: there is no step, or ``skip`` is not from 0 to 1.

    Example:
      >>> from sadsl.catalog.sparsed import plan_step
      >>> plan_step(64)
      13
    """
    if num_steps < 1 or not 0 <= skip <= 1:
        raise ValueError(
            f"plan_step: num_steps={num_steps} must be at least 1, and skip={skip} "
            "from 0 to 1"
        )
    return int(num_steps * skip) + 1
