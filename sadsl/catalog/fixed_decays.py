"""RetNet and Lightning attention: each head forgets at a rate of its own."""

import math

from sadsl.maps.base import IndexMap, at_least
from sadsl.terms.linear import Linear, linear


def ret_net(num_heads: int = 8, map: IndexMap | None = None) -> Linear:
    """Retention: head ``h`` keeps ``1 - 2 ** (-5 - h)`` of its state in a step.

    Sun et al., Retentive network: a successor to transformer for large language models,
    2023, section 2.2. There is no normaliser; the paper normalises the output of each
    head. Queries and keys carry rotary positions before the call.

    Args:
      num_heads: heads of the queries.
      map: a causal map; ``causal()`` if None.

    Raises:
      ValueError: there is no head, or the map is not causal.

    Example:
      >>> from sadsl import catalog
      >>> catalog.ret_net(2)
      linear('identity', decay=(0.96875, 0.984375), normalise=False, scaled=True)
    """
    at_least("ret_net", "num_heads", num_heads, 1)
    decay = tuple(1 - 2.0 ** (-5 - h) for h in range(num_heads))
    return linear("identity", decay, map=map, normalise=False, scaled=True)


def minimax_lightning(
    num_heads: int = 64,
    layer: int = 0,
    num_layers: int = 80,
    map: IndexMap | None = None,
) -> Linear:
    """Lightning attention of MiniMax-01: decays by head, which weaken with the layer.

    Head ``h`` keeps ``exp(-s)`` of its state, with ``s = 2 ** (-8 (h + 1) / num_heads)
    * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)`` (MiniMax, MiniMax-01: scaling
    foundation models with Lightning attention, 2025, section 2.2; the formula is that
    of the model's code in transformers). Queries, keys and values pass through SiLU
    before the call; there is no scale and no normaliser. Other code has other slopes.

    Args:
      num_heads: heads of the queries.
      layer: which layer of the stack, from 0.
      num_layers: layers of the stack, full attention too.
      map: a causal map; ``causal()`` if None.

    Raises:
      ValueError: there is no such layer, or no head.

    Example:
      >>> from sadsl import catalog
      >>> [round(x, 3) for x in catalog.minimax_lightning(4, 1, 4).decay]
      [0.846, 0.959, 0.99, 0.997]
    """
    at_least("minimax_lightning", "num_heads", num_heads, 1)
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"layer={layer} must be at least 0 and below num_layers={num_layers}"
        )
    depth = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    slopes = (2.0 ** (-8 * (h + 1) / num_heads) * depth for h in range(num_heads))
    decay = tuple(math.exp(-slope) for slope in slopes)
    return linear("identity", decay, map=map, normalise=False)
