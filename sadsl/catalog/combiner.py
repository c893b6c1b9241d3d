"""Combiner: full attention, most of it through summaries of regions.

Ren, Dai, Dai, Yang, Leskovec, Schuurmans and Dai, Combiner: full attention transformer
with sparse computation cost, 2021. A query attends directly to some keys and to the
summaries of disjoint regions that hold all others, under one normaliser, so that every
visible key has a weight. Each function returns a term for self-attention.
"""

from typing import Literal

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, offsets, where
from sadsl.maps.named import causal as causal_map
from sadsl.selections.kmeans import Norm, kmeans
from sadsl.terms.cluster_regions import clusters
from sadsl.terms.mixtures import Average, Joint, average, joint
from sadsl.terms.regions import KeyOf, Pool, columns, rowmajor, rows, spans, tower
from sadsl.terms.summaries import Phi, summaries

Form = Literal["paper", "code"]


def combiner_fixed(
    span: int = 32,
    causal: bool = True,
    pool: Pool = "max",
    phi: Phi = "identity",
    own: bool = False,
) -> Joint:
    """The query's own span directly, and a summary of each other span before it.

    The cost is least where ``span`` is about ``sqrt(2 * n)``, and of order ``n**1.5``.
    32 is the default of the published JAX layer, 128 that of its TensorFlow form.
    ``span=1`` and ``span=n`` are dense attention, for the pools "max" and "mean".

    Args:
      span: tokens in a span.
      causal: whether later tokens are hidden; else all other spans are summarised.
      pool, phi: see ``sadsl.summaries``.
      own: count the query's own span twice, also by its summary, as the bidirectional
        TensorFlow code does; the paper does not.
    """
    near = blocks(span) & causal_map() if causal else blocks(span)
    far = summaries(spans(span, causal, own), pool, phi)
    return joint(near, far, overlap="count" if own else "remove")


def combiner_logsparse(
    causal: bool = True, pool: Pool = "max", phi: Phi = "identity"
) -> Joint:
    """The token itself, and a summary for each bit that is set in its position.

    Bit ``l`` stands for ``2**l`` tokens: together, all before the query, at a cost of
    order ``n * log(n)``. Bit 0 is a region of one token. ``pool``, ``phi``: see
    ``sadsl.summaries``.

    Raises:
      ValueError: ``causal=False``, for which the published form is causal only.
    """
    if not causal:
        raise ValueError(
            "combiner_logsparse: causal=False is not defined: the regions of a token "
            "are read off the bits of its position, and lie before it; use "
            "combiner_fixed(..., causal=False)"
        )
    return joint(offsets({0}), summaries(tower(), pool, phi))


def combiner_axial_vertical(
    width: int = 32, causal: bool = True, pool: Pool = "max", phi: Phi = "identity"
) -> Joint:
    """On rows of ``width`` tokens: own row and column, a summary of each other column.

    Columns are summarised above the query's row if ``causal``, else without that row.
    """
    return joint(*_cross(width, causal), summaries(columns(width, causal), pool, phi))


def combiner_axial_horizontal(
    width: int = 32, causal: bool = True, pool: Pool = "max", phi: Phi = "identity"
) -> Joint:
    """On rows of ``width`` tokens: own row and column, a summary of each other row.

    Rows are summarised without the query's column; those above it if ``causal``.
    """
    return joint(*_cross(width, causal), summaries(rows(width, causal), pool, phi))


def combiner_axial_rowmajor(
    width: int = 32, causal: bool = True, key: KeyOf = "proj", proj: str = "proj"
) -> Joint:
    """On rows of ``width`` tokens: own row, and each other row as my column sees it.

    The published layer learns the key of a summary from its value: pass the function
    as the operand ``proj``; ``key="wsum"`` needs none. See ``sadsl.rowmajor``.
    """
    own = _cross(width, causal)[0]
    return joint(own, summaries(rowmajor(width, causal, key, proj)))


def combiner_mixture(
    width: int = 32,
    form: Form = "paper",
    causal: bool = True,
    pool: Pool = "max",
    phi: Phi = "identity",
) -> Joint | Average:
    """Axial-Vertical and Axial-Horizontal together, on rows of ``width`` tokens.

    Form "paper" is the mean of the two outputs. Form "code", the published layer, has
    one normaliser over the own row, the column above, the other columns above, and the
    rows above left and right of the query's column: each direct key counts once, and
    the tokens off the row and column twice, by a column and by a row.

    Raises:
      NotImplementedError: form "code" with ``causal=False``, whose published form
        gives weight to empty regions.
    """
    if form == "paper":
        options = width, causal, pool, phi
        return average(
            combiner_axial_vertical(*options), combiner_axial_horizontal(*options)
        )
    if form != "code":
        raise ValueError(f"combiner_mixture: form={form!r} must be 'paper' or 'code'")
    if not causal:
        raise NotImplementedError(
            "combiner_mixture: form='code' with causal=False: the published code gives "
            "weight to empty regions; use form='paper'"
        )
    regions = columns(width), rows(width, part="before"), rows(width, part="after")
    far = (summaries(r, pool, phi) for r in regions)
    return joint(*_cross(width, causal), *far, overlap="count")


def routing_combiner(
    num_clusters: int = 8,
    causal: bool = True,
    pool: Pool = "max",
    phi: Phi = "identity",
    centroids: str = "centroids",
    norm: Norm = "layer",
    share_qk: bool = True,
) -> Joint:
    """The query's own cluster directly, and a summary of each other cluster.

    Every token is in the cluster of the nearest centroid, so that clusters are disjoint
    and hold all tokens. If ``causal``, clusters are taken up to the query. The operand
    ``centroids`` is ``[num_q_heads, num_clusters, head_dim]``; see ``sadsl.kmeans``.
    """
    near = kmeans(
        num_clusters, members="argmax", centroids=centroids, norm=norm,
        share_qk=share_qk,
    )  # fmt: skip
    direct = causal_map() & near if causal else near
    return joint(direct, summaries(clusters(near, causal), pool, phi))


def _cross(width: int, causal: bool) -> tuple[IndexMap, IndexMap]:
    """The row of a query, and its column without that row."""
    column = where(lambda q, k: q % width == k % width)
    if causal:
        above = column & where(lambda q, k: k // width < q // width)
        return blocks(width) & causal_map(), above
    return blocks(width), column - blocks(width)
