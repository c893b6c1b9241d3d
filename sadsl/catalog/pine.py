"""PINE: documents that see each other, whatever their order."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise
from operator import or_

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, keys, queries


def pine(prefix: int, documents: Sequence[int]) -> IndexMap:
    """Causal, but a document also sees all later documents.

    Wang et al., Eliminating position bias of language models: a mechanistic approach,
    2024, section 3. ``prefix`` tokens come before documents of the given lengths; what
    follows them is causal. This is the mask alone: the method also gives the keys of
    each document new positions by query document and head, which depend on content.
    """
    starts = list(accumulate(documents, initial=prefix))
    later = [queries(a, b) & keys(b, starts[-1]) for a, b in pairwise(starts[:-1])]
    return reduce(or_, later, causal())
