"""Modality-mutual attention of AKI: the image sees the question that follows it."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, keys, queries


def modality_mutual(image: tuple[int, int], question: tuple[int, int]) -> IndexMap:
    """Causal, but queries of ``image`` also see the keys of ``question``.

    Wang et al., Seeing is understanding: unlocking causal attention into
    modality-mutual attention for multimodal LLMs, 2025. Spans are (start, stop). In the
    code all positions from the image's start to the question's count as image, which is
    ``image=(image_start, question_start)``; the question ends before the answer, which
    stays causal. Padding is for ``segments()``.
    """
    return causal() | (queries(*image) & keys(*question))
