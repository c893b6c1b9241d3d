"""Models with sinks: gpt-oss, MiMo-V2-Flash, Granite."""

from sadsl.catalog.models.delta_hybrids import in_turn
from sadsl.maps.base import at_least
from sadsl.maps.named import causal, window
from sadsl.terms.base import Term
from sadsl.terms.softmax import softmax

SEEN = softmax(causal(), sink=True)


def _nearby(name: str, near: int) -> Term:
    at_least(name, "near", near, 1)
    return softmax(causal() & window(near - 1), sink=True)


def gpt_oss(num_layers: int = 36, near: int = 128) -> tuple[Term, ...]:
    """gpt-oss: a window and a full layer in turn, with a sink for each head.

    OpenAI, gpt-oss-120b and gpt-oss-20b model card, 2025, section 2, and transformers
    5.24: 64 query heads, 8 key heads. The 20b model has 24 layers.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> models.gpt_oss(2)
      (softmax(causal() & window(127), sink='sink'), softmax(causal(), sink='sink'))
    """
    return in_turn("gpt_oss", _nearby("gpt_oss", near), num_layers, 2, SEEN)


def mimo_v2_flash(num_layers: int = 48, near: int = 129) -> tuple[Term, ...]:
    """MiMo-V2-Flash: full layers 0, 5, 11, ..., and windows with sinks between them.

    As in transformers 5.24: 64 query heads, 4 key heads in full layers and 8 in
    windows; keys of 192 and values of 128 channels. A window has 128 keys before the
    query and its own. The layer multiplies values by 0.707.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> layers = models.mimo_v2_flash()
      >>> [i for i, x in enumerate(layers) if repr(x) == "softmax(causal())"]
      [0, 5, 11, 17, 23, 29, 35, 41, 47]
    """
    full = softmax(causal())
    nearby = _nearby("mimo_v2_flash", near)
    return full, *in_turn("mimo_v2_flash", nearby, num_layers, 6, full)[1:]


def granite_swa(num_layers: int = 24, near: int = 128) -> tuple[Term, ...]:
    """Granite with windows: one full layer, three windows, and so on, with sinks.

    As in transformers 5.24: 20 query heads, 4 key heads. The call's ``sm_scale`` is the
    model's ``attention_multiplier``.

    Args:
      num_layers: layers of the stack.
      near: keys of a window, the query's own among them.

    Raises:
      ValueError: there is no layer, or no key in a window.

    Example:
      >>> from sadsl.catalog import models
      >>> [repr(x) == "softmax(causal(), sink='sink')" for x in models.granite_swa(6)]
      [True, False, False, False, True, False]
    """
    nearby = _nearby("granite_swa", near)
    return in_turn("granite_swa", nearby, num_layers, 4, SEEN, first=0)
