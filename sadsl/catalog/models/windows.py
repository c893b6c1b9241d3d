"""Windows and full layers in turn, without sinks: OLMo, Cohere, Llama and others.

What a layer adds (norms, rotary positions, gates) is no part of a spec.
"""

from sadsl.catalog.models.delta_hybrids import in_turn
from sadsl.maps.base import at_least
from sadsl.maps.named import blocks, causal, full, window
from sadsl.maps.numbers import log
from sadsl.terms.base import Term
from sadsl.terms.biases import bias
from sadsl.terms.softmax import softmax


def _windows(
    name: str, num_layers: int, near: int, period: int, first: int | None = None
) -> tuple[Term, ...]:
    """Causal windows of ``near`` keys; one of ``period`` layers is full."""
    at_least(name, "near", near, 1)
    nearby = softmax(causal() & window(near - 1))
    return in_turn(name, nearby, num_layers, period, softmax(causal()), first)


def olmo_3(num_layers: int = 32, near: int = 4096) -> tuple[Term, ...]:
    """OLMo 3: three windows, one full layer, and so on.

    Of OLMo-3-7B (OLMo Team, OLMo 3, 2025), as in transformers 5.24: 32 heads; q and k
    are normed over all heads together.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.olmo_3(4)[2:]
      (softmax(causal() & window(4095)), softmax(causal()))
    """
    return _windows("olmo_3", num_layers, near, 4)


def cohere_2(num_layers: int = 40, near: int = 4096) -> tuple[Term, ...]:
    """Cohere 2 (Command R7B, Command A): three windows, one full layer, and so on.

    As in transformers 5.24, with the defaults of its class; its mixtures of experts
    have the same attention. Full layers have no rotary positions.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> sum(repr(term) == "softmax(causal())" for term in models.cohere_2())
      10
    """
    return _windows("cohere_2", num_layers, near, 4)


def exaone_4(num_layers: int = 32, near: int = 4096) -> tuple[Term, ...]:
    """EXAONE 4: three windows, one full layer, and so on.

    As in transformers 5.24, with the defaults of its class (read, not run): 32 heads; q
    and k are normed; full layers have no rotary positions.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.exaone_4() == models.olmo_3()
      True
    """
    return _windows("exaone_4", num_layers, near, 4)


def afmoe(num_layers: int = 32, near: int = 1024) -> tuple[Term, ...]:
    """AFMoE: three windows, one full layer, and so on.

    As in transformers 5.24, with the defaults of its class (read, not run): q and k are
    normed, full layers have no rotary positions, and a sigmoid gates each channel of
    the output.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.afmoe()[0]
      softmax(causal() & window(1023))
    """
    return _windows("afmoe", num_layers, near, 4)


def muse_spark(num_layers: int = 62, near: int = 2048) -> tuple[Term, ...]:
    """Muse-Spark: window, full, window, window, and so on.

    As in transformers 5.24, with the defaults of its class (read, not run): 128 query
    heads, 16 key heads; q and k are normed, some layers have no rotary positions, and
    the normed output of a head has a gate.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> [repr(term) == "softmax(causal())" for term in models.muse_spark(6)]
      [False, True, False, False, False, True]
    """
    return _windows("muse_spark", num_layers, near, 4, first=1)


def kolibri_1(num_layers: int = 50, near: int = 513) -> tuple[Term, ...]:
    """Kolibri-1: four windows, one full layer, and so on.

    As in transformers 5.24, with the defaults of its class (read, not run): 48 query
    heads, 4 key heads.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.kolibri_1(5)[3:]
      (softmax(causal() & window(512)), softmax(causal()))
    """
    return _windows("kolibri_1", num_layers, near, 5)


def smollm_3(num_layers: int = 36) -> tuple[Term, ...]:
    """SmolLM3: full layers, of which every fourth has no rotary positions.

    As in transformers 5.24: 16 query heads, 4 key heads. All specs are the same.

    Args:
      num_layers: layers of the stack.

    Raises:
      ValueError: there is no layer.

    Example:
      >>> from sadsl.catalog import models
      >>> set(models.smollm_3())
      {softmax(causal())}
    """
    at_least("smollm_3", "num_layers", num_layers, 1)
    return (softmax(causal()),) * num_layers


def llama_4(
    num_layers: int = 48, chunk: int = 8192, floor: int = 8192, alpha: float = 0.1
) -> tuple[Term, ...]:
    """Llama 4: three layers of chunks, one full layer with a temperature, and so on.

    As in transformers 5.24: 40 query heads, 8 key heads. Chunks have rotary positions,
    and q and k are normed after the rotation. Full layers have no positions: the query
    at ``t`` is multiplied by ``1 + alpha * ln(1 + (t + 1) // floor)``.

    Args:
      num_layers: layers of the stack.
      chunk: keys of a chunk; no query sees another chunk.
      floor: from this position on the temperature grows.
      alpha: how fast it grows.

    Raises:
      ValueError: a number is below 1.

    Example:
      >>> from sadsl.catalog import models
      >>> for term in models.llama_4()[2:4]:
      ...     print(term)
      softmax(causal() & blocks(8192))
      softmax(causal(), scale=bias(lambda q, k, h: 1.0 + (0.1 * log(1 + (q + 1) //
      8192))))
    """
    at_least("llama_4", "chunk", chunk, 1)
    at_least("llama_4", "floor", floor, 1)
    factor = bias(lambda q, k, h: 1.0 + alpha * log(1 + (q + 1) // floor))
    chunks, seen = softmax(causal() & blocks(chunk)), softmax(causal(), scale=factor)
    return in_turn("llama_4", chunks, num_layers, 4, seen)


def modernbert(num_layers: int = 22, near: int = 128) -> tuple[Term, ...]:
    """ModernBERT: one full layer, two windows, and so on; all see both ways.

    Of ModernBERT-base (Warner et al., Smarter, better, faster, longer, 2024, section
    2), as in transformers 5.24: 12 heads. The large model has 28 layers (not verified
    in its files).

    Args:
      num_layers: layers of the stack.
      near: the published ``local_attention``: half of it on either side of the query.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.modernbert(3)
      (softmax(full()), softmax(window(64, 64)), softmax(window(64, 64)))
    """
    at_least("modernbert", "near", near, 1)
    nearby = softmax(window(near // 2, near // 2))
    return in_turn("modernbert", nearby, num_layers, 3, softmax(full()), first=0)
