"""SnapKV: the keys of a prompt that stay in the cache."""

from sadsl.maps.base import IndexMap
from sadsl.selections.kept_keys import kept_keys


def snapkv(
    prompt: int, capacity: int = 1024, *, last: int = 256, pool: int = 21
) -> IndexMap:
    """Tokens after the ``prompt`` see ``capacity`` of its keys, and all later ones.

    Li et al., SnapKV: LLM knows what you are looking for before generation, 2024,
    section 4, as in Nawrot et al., The sparse frontier, 2025, whose defaults these are;
    the first 4 and the last 128 keys stay and count. To decode, choose at the end of
    the prompt by ``sadsl.select``, pass what it returns as ``operands=``.
    """
    return kept_keys(prompt, capacity, last=last, pool=pool)
