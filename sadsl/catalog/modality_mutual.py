"""Modality-mutual attention of AKI: the image sees the question that follows it."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, keys, queries


def modality_mutual(image: tuple[int, int], question: tuple[int, int]) -> IndexMap:
    """Causal, but the queries of ``image`` also see the keys of ``question``.

    Wang et al., Seeing is understanding: unlocking causal attention into
    modality-mutual attention for multimodal LLMs, 2025. In the code all positions from
    the image's start to the question's start count as image, which is
    ``image=(image_start, question_start)``. The question ends before the answer, which
    stays causal. Use ``segments()`` for padding.

    Args:
      image: start and stop of the image, in positions.
      question: start and stop of the question, in positions.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.modality_mutual((0, 2), (3, 5)).dense(6)[0].astype(int))
      [[1 0 0 1 1 0]
       [1 1 0 1 1 0]
       [1 1 1 0 0 0]
       [1 1 1 1 0 0]
       [1 1 1 1 1 0]
       [1 1 1 1 1 1]]
    """
    return causal() | (queries(*image) & keys(*question))
