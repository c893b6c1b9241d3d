"""PINE: documents see each other, whatever their order."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise
from operator import or_

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, keys, queries


def pine(prefix: int, documents: Sequence[int]) -> IndexMap:
    """Causal, but each document also sees all later documents.

    Wang et al., Eliminating position bias of language models: a mechanistic approach,
    2024, section 3. What follows the documents is causal. This is the mask alone: the
    method also gives the keys of each document new positions by query document and
    head, which depend on content.

    Args:
      prefix: tokens before the documents.
      documents: length of each document, in tokens.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.pine(1, (2, 2)).dense(6)[0].astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 1 1 0]
       [1 1 1 1 1 0]
       [1 1 1 1 0 0]
       [1 1 1 1 1 0]
       [1 1 1 1 1 1]]
    """
    starts = list(accumulate(documents, initial=prefix))
    later = [queries(a, b) & keys(b, starts[-1]) for a, b in pairwise(starts[:-1])]
    return reduce(or_, later, causal())
