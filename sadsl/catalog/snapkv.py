"""SnapKV: the keys of a prompt that stay in the cache."""

from sadsl.maps.base import IndexMap
from sadsl.selections.kept_keys import kept_keys


def snapkv(
    prompt: int, capacity: int = 1024, *, last: int = 256, pool: int = 21
) -> IndexMap:
    """Tokens after a prompt see ``capacity`` of its keys, and all later keys.

    Li et al., SnapKV: LLM knows what you are looking for before generation, 2024,
    section 4, as in Nawrot et al., The sparse frontier, 2025, whose defaults these are.
    The first 4 and the last 128 keys of the prompt stay and count. To decode, choose at
    the end of the prompt by ``sadsl.select``, then pass what it returns as
    ``operands=``.

    Args:
      prompt: tokens of the prompt, which is attended to densely.
      capacity: keys of the prompt that stay.
      last: last queries of the prompt, whose attention ranks its keys.
      pool: neighbouring keys over which that attention is smoothed.

    Example:
      >>> from sadsl import catalog
      >>> catalog.snapkv(4096, 512)
      kept_keys(4096, 512)
    """
    return kept_keys(prompt, capacity, last=last, pool=pool)
