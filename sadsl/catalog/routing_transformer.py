"""Routing Transformer: local heads, and heads that cluster tokens by content."""

from typing import Literal, get_args

from sadsl.maps.named import causal, where
from sadsl.selections.kmeans import Norm, kmeans
from sadsl.terms.heads import Heads, heads
from sadsl.terms.scatter_mean import OwnKey, scatter_mean

Variant = Literal["official", "lucidrains"]


def routing_transformer(
    num_heads: int = 16,
    num_clusters: int = 8,
    window: int | None = 512,
    local_window: int = 256,
    variant: Variant = "official",
    num_local: int | None = None,
    share_qk: bool = True,
    skip_zeros: bool = False,
) -> Heads:
    """Some heads attend to nearby blocks, the others within clusters of similar tokens.

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4; causal. The defaults are those for WikiText-103 at length 4096. In
    a local head, a block of ``local_window`` tokens sees itself and the block before.
    The operand ``centroids`` is ``[clustered heads, num_clusters, head_dim]``. The
    layers ``RoutingAttention`` learn it.

    Variant "official" (the published code) normalises queries and keys of the clustered
    heads to mean 0 and variance 1, and does not scale their products. "lucidrains"
    (Wang, routing-transformer, 2020) takes queries as they are and normalises them to
    length 1 as keys; a token attends to itself only where it is alone.

    Args:
      num_heads: heads in all.
      num_clusters: clusters of each clustered head.
      window: positions in a cluster; None for clusters of any size.
      local_window: positions in a block of a local head.
      variant: "official" or "lucidrains".
      num_local: local heads, the first ones; half of all if None.
      share_qk, skip_zeros: see ``kmeans`` and ``scatter_mean``.

    Raises:
      ValueError: there is no such variant.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.routing_transformer(4, window=16, local_window=8))
      heads((causal() & where(lambda q, k: q // 8 - k // 8 <= 1), 2),
      (scatter_mean(causal() & kmeans(8, window=16), sm_scale=1.0), 2))
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} must be 'official' or 'lucidrains'")
    local = num_heads // 2 if num_local is None else num_local
    near = where(lambda q, k: q // local_window - k // local_window <= 1)
    norm: Norm = "layer" if variant == "official" else "unit"
    clusters = causal() & kmeans(num_clusters, window, norm=norm, share_qk=share_qk)
    if variant == "official":
        routed = scatter_mean(clusters, sm_scale=1.0, skip_zeros=skip_zeros)
    else:
        own: OwnKey = "alone" if share_qk else "seen"
        routed = scatter_mean(clusters, 1e-5, own_key=own, skip_zeros=skip_zeros)
    parts = (causal() & near, local), (routed, num_heads - local)
    return heads(*(part for part in parts if part[1]))
