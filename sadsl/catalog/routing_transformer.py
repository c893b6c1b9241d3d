"""Routing Transformer: local heads, and heads whose tokens are clustered by content."""

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
    """``num_local`` heads (half) local, the others clustered around ``centroids``.

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4; causal. The defaults are those for WikiText-103 at length 4096.
    Local: blocks of ``local_window`` see themselves and the whole block before.
    Clustered: ``num_clusters`` of ``window`` positions each. The operand ``centroids``
    is ``[heads that cluster, num_clusters, head_dim]``.

    ``variant`` "official" (the published code) takes queries and keys of the clustered
    heads that are normalised to mean 0 and variance 1, and does not scale their
    products. "lucidrains" (Wang, routing-transformer, 2020) takes queries as they are,
    which as keys are of length 1; a token attends to itself only where it is alone.
    The layers ``RoutingAttention`` do either. ``share_qk``, ``skip_zeros``: see
    ``kmeans`` and ``scatter_mean``.
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
