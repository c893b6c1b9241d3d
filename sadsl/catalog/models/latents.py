"""Full layers of Mistral and LongCat: a temperature by position, latents."""

from sadsl.maps.base import at_least
from sadsl.maps.named import causal
from sadsl.maps.numbers import log
from sadsl.terms.base import Term
from sadsl.terms.biases import bias
from sadsl.terms.latent import latent
from sadsl.terms.softmax import Softmax, softmax


def _tempered(name: str, original: int, alpha: float) -> Softmax:
    """Queries times ``1 + alpha * ln(1 + t // original)`` at position ``t``."""
    at_least(name, "original", original, 1)
    factor = bias(lambda q, k, h: 1.0 + alpha * log(1 + q // original))
    return softmax(causal(), scale=factor)


def ministral_3(
    num_layers: int = 34, original: int = 16384, alpha: float = 0.1
) -> tuple[Term, ...]:
    """Ministral 3: full layers with a temperature by position.

    Of Ministral-3-8B, as in transformers 5.24 (read, not run): 32 query heads, 8 key
    heads; rotary positions with YaRN.

    Args:
      num_layers: layers of the stack.
      original: the length before YaRN; every so many positions the temperature grows.
      alpha: how fast it grows.

    Raises:
      ValueError: there is no layer, or ``original`` is below 1.

    Example:
      >>> from sadsl.catalog import models
      >>> print(models.ministral_3(1)[0])
      softmax(causal(), scale=bias(lambda q, k, h: 1.0 + (0.1 * log(1 + q // 16384))))
    """
    at_least("ministral_3", "num_layers", num_layers, 1)
    return (_tempered("ministral_3", original, alpha),) * num_layers


def mistral_4(
    num_layers: int = 36, original: int = 8192, alpha: float = 0.1
) -> tuple[Term, ...]:
    """Mistral 4: latents, with a temperature by position.

    As in transformers 5.24: 32 heads, latents of 256 channels. The call's ``sm_scale``
    holds the square of YaRN's ``mscale``.

    Args:
      num_layers: layers of the stack.
      original: the length before YaRN; every so many positions the temperature grows.
      alpha: how fast it grows.

    Raises:
      ValueError: there is no layer, or ``original`` is below 1.

    Example:
      >>> from sadsl.catalog import models
      >>> models.mistral_4(1)[0].operands
      {'kv_b': 3}
    """
    at_least("mistral_4", "num_layers", num_layers, 1)
    return (latent(_tempered("mistral_4", original, alpha)),) * num_layers


def longcat_flash(num_blocks: int = 28) -> tuple[Term, ...]:
    """LongCat-Flash: blocks of two layers of latents.

    As in transformers 5.24. The layer multiplies q by ``sqrt(hidden / q rank)`` and the
    latent by ``sqrt(hidden / kv rank)``.

    Args:
      num_blocks: blocks of the stack; each has two layers of attention.

    Raises:
      ValueError: there is no block.

    Example:
      >>> from sadsl.catalog import models
      >>> len(models.longcat_flash()), models.longcat_flash()[0]
      (56, latent(causal()))
    """
    at_least("longcat_flash", "num_blocks", num_blocks, 1)
    return (latent(causal()),) * (2 * num_blocks)
