"""Hybrids: exact attention nearby, and a cheaper mechanism for all that is past."""

from sadsl.maps.named import causal
from sadsl.maps.named import window as near
from sadsl.terms.linear import linear
from sadsl.terms.mixtures import Gated, gated


def linear_and_window(
    window: int = 256, feature_map: str = "elu1", decay: float | str | None = None
) -> Gated:
    """Softmax over the last ``window`` keys and the own, and linear attention over all.

    Munkhdalai et al., Leave no context behind: efficient infinite context transformers
    with Infini-attention, 2024, section 2.1.3, weighs the two by a sigmoid a head; here
    it is one of each query, head and part, from the operand "gates", which layers learn
    (a gate that does not read its query is the bias of that projection). Arora et al.,
    Simple linear attention language models balance the recall-throughput tradeoff
    (Based), 2024, alternates them by layer: ``per_layer(["linear()", "causal() &
    window(64)"], num_layers)``. ``feature_map`` and ``decay`` are those of ``linear``.
    Time is linear in the length.
    """
    return gated(causal() & near(window), linear(feature_map, decay))
