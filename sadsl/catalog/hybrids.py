"""Hybrids: exact attention nearby, linear attention for the whole past."""

from sadsl.maps.named import causal
from sadsl.maps.named import window as near
from sadsl.terms.linear import linear
from sadsl.terms.mixtures import Gated, gated


def linear_and_window(
    window: int = 256, feature_map: str = "elu1", decay: float | str | None = None
) -> Gated:
    """Gates softmax over the last ``window`` keys and linear attention over all keys.

    Munkhdalai et al., Leave no context behind: efficient infinite context transformers
    with Infini-attention, 2024, section 2.1.3, weighs the two parts by one sigmoid for
    each head. Here each query, head and part has a gate of its own, from the operand
    "gates", which layers learn. (A gate that does not read its query is the bias of
    that projection.) Time is linear in the length.

    Arora et al., Simple linear attention language models balance the recall-throughput
    tradeoff (Based), 2024, alternates the two by layer instead:
    ``per_layer(["linear()", "causal() & window(64)"], num_layers)``.

    Args:
      window: keys before the query that the softmax covers, besides its own.
      feature_map, decay: those of ``sadsl.linear``.

    Example:
      >>> from sadsl import catalog
      >>> catalog.linear_and_window(64)
      gated(causal() & window(64), linear())
    """
    return gated(causal() & near(window), linear(feature_map, decay))
