"""Gemma 2, 3 and 4, and EmbeddingGemma: windows and full layers in turn."""

from sadsl.catalog.models.delta_hybrids import in_turn
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.named import causal, full, where, window
from sadsl.maps.symbols import operand
from sadsl.terms.base import Term
from sadsl.terms.softmax import softmax


def gemma_2(
    num_layers: int = 26, near: int = 4096, cap: float = 50.0
) -> tuple[Term, ...]:
    """Gemma 2: a window and a full layer in turn, with capped scores.

    Gemma Team, Gemma 2: improving open language models at a practical size, 2024,
    section 2, and transformers 5.24. The call's ``sm_scale`` is
    ``query_pre_attn_scalar ** -0.5``, 1/16 in the 2B model.

    Args:
      num_layers: layers of the stack; 26 in the 2B model.
      near: keys of a window, the query's own among them.
      cap: the soft cap of the scores.

    Raises:
      ValueError: there is no layer, no key in a window, or the cap is not positive.

    Example:
      >>> from sadsl.catalog import models
      >>> for term in models.gemma_2(2):
      ...     print(term)
      softmax(causal() & window(4095), logits_soft_cap=50.0)
      softmax(causal(), logits_soft_cap=50.0)
    """
    at_least("gemma_2", "near", near, 1)
    window_layer = softmax(causal() & window(near - 1), logits_soft_cap=cap)
    full_layer = softmax(causal(), logits_soft_cap=cap)
    return in_turn("gemma_2", window_layer, num_layers, 2, full_layer)


def gemma_3(
    num_layers: int = 26, near: int = 512, images: str | None = None
) -> tuple[Term, ...]:
    """Gemma 3: five windows, one full layer, and so on.

    Gemma Team, Gemma 3 technical report, 2025, section 2, and transformers 5.24. The
    defaults are those of the 1B model. The larger ones have windows of 1,024 keys and
    34, 48 and 62 layers (4B, 12B, 27B; their numbers were not verified in the models'
    files). The layer norms q and k, and rotates by another base in full layers.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.
      images: the operand ``[batch or 1, seq]`` of integers that says which image a
        token belongs to, -1 for text: the tokens of an image all see one another, in
        all layers. None for text alone.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> layers = models.gemma_3()
      >>> [i for i, x in enumerate(layers) if repr(x) == "softmax(causal())"]
      [5, 11, 17, 23]
      >>> print(models.gemma_3(1, images="image")[0])
      softmax((causal() & window(511)) | where(lambda q, k: (operand('image')[q] ==
      operand('image')[k]) & (0 <= operand('image')[q])))
    """
    at_least("gemma_3", "near", near, 1)
    seen = _and_images(causal(), images)
    nearby = _and_images(causal() & window(near - 1), images)
    return in_turn("gemma_3", softmax(nearby), num_layers, 6, softmax(seen))


def embedding_gemma(num_layers: int = 24, near: int = 512) -> tuple[Term, ...]:
    """EmbeddingGemma: the layers of Gemma 3, which see both ways.

    As in transformers 5.24, a window of ``near`` keys has ``near // 2`` on either side
    of the query. The numbers of layers and keys were not verified in the model's files.

    Args:
      num_layers: layers of the stack.
      near: keys of a window.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.embedding_gemma()[0], models.embedding_gemma()[5]
      (softmax(window(256, 256)), softmax(full()))
    """
    at_least("embedding_gemma", "near", near, 1)
    nearby = softmax(window(near // 2, near // 2))
    return in_turn("embedding_gemma", nearby, num_layers, 6, softmax(full()))


def gemma_4(
    num_layers: int = 30, near: int = 512, images: str | None = None
) -> tuple[Term, ...]:
    """Gemma 4: five windows, one full layer, and so on; the last layer is full.

    As in transformers 5.24, with the defaults of its class. The call's ``sm_scale`` is
    1: the layer norms q, k and v. Full layers have wider heads, fewer key heads and a
    quarter of the channels rotated. Layers that share keys and values with an earlier
    layer pass those arrays; their specs are the same.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.
      images: as in ``gemma_3``, where images are seen both ways.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> [repr(x) == "softmax(causal())" for x in models.gemma_4(8)]
      [False, False, False, False, False, True, False, True]
    """
    at_least("gemma_4", "near", near, 1)
    seen = softmax(_and_images(causal(), images))
    nearby = softmax(_and_images(causal() & window(near - 1), images))
    return *in_turn("gemma_4", nearby, num_layers, 6, seen)[:-1], seen


def _and_images(tokens: IndexMap, images: str | None) -> IndexMap:
    """The map, and all pairs of tokens of one image."""
    if images is None:
        return tokens
    image = operand(images)
    return tokens | where(lambda q, k: (image[q] == image[k]) & (image[q] >= 0))
