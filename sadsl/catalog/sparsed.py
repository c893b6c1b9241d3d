"""SparseD: a plan made once, for many denoising steps."""

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
    """The blocks of keys that hold most attention of a block of queries.

    Wang et al., SparseD: sparse attention for diffusion language models, 2025, section
    4. Of the keys before the last ``new_tokens``, and of those, choices are made apart:
    ``floor(blocks * ratio) + 1`` blocks each, but the first choice is among all keys
    and then loses the new ones. ``select`` at step ``plan_step`` makes the plan; pass
    what it returns as ``operands`` in the steps after it. ``scale`` is ``sm_scale`` if
    None; the code has ``num_heads ** -0.5`` there.
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
    """The step in which SparseD makes its plan: up to it, all steps are dense."""
    if num_steps < 1 or not 0 <= skip <= 1:
        raise ValueError(
            f"plan_step: num_steps={num_steps} must be at least 1, and skip={skip} "
            "from 0 to 1"
        )
    return int(num_steps * skip) + 1
