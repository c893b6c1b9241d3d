"""Combiner: full attention, most of it through summaries of regions.

Ren, Dai, Dai, Yang, Leskovec, Schuurmans and Dai, Combiner: full attention transformer
with sparse computation cost, 2021. A query attends directly to some keys, and to one
summary of each disjoint region that holds other keys. All share one normaliser, so
every visible key has a weight. Each function returns a term for self-attention.
"""

from typing import Literal

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, offsets, where
from sadsl.maps.named import causal as causal_map
from sadsl.selections.kmeans import Norm, kmeans
from sadsl.terms.cluster_regions import clusters
from sadsl.terms.grid_regions import KeyOf, columns, rowmajor, rows
from sadsl.terms.mixtures import Average, Joint, average, joint
from sadsl.terms.regions import Pool, spans, tower
from sadsl.terms.summaries import Phi, summaries

Form = Literal["paper", "code"]


def combiner_fixed(
    span: int = 32,
    causal: bool = True,
    pool: Pool = "max",
    phi: Phi = "identity",
    own: bool = False,
) -> Joint:
    """A query attends to its own span, and to a summary of each span before it.

    The cost is least where ``span`` is about ``sqrt(2 * n)``, and of order ``n**1.5``.
    32 is the default of the published JAX layer, 128 that of its TensorFlow form. With
    the pools "max" and "mean", ``span=1`` and ``span=n`` are dense attention.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      span: tokens in a span.
      causal: whether later tokens are hidden; else all other spans are summarised.
      pool, phi: see ``sadsl.summaries``.
      own: whether the query's own span counts twice, directly and by its summary. The
        bidirectional TensorFlow code does so; the paper does not.

    Example:
      >>> from sadsl import catalog
      >>> catalog.combiner_fixed(4)
      joint(blocks(4) & causal(), summaries(spans(4)))
    """
    near = blocks(span) & causal_map() if causal else blocks(span)
    far = summaries(spans(span, causal, own), pool, phi)
    return joint(near, far, overlap="count" if own else "remove")


def combiner_logsparse(
    causal: bool = True, pool: Pool = "max", phi: Phi = "identity"
) -> Joint:
    """A query attends to itself, and to one summary for each set bit of its position.

    Bit ``l`` stands for a region of ``2**l`` tokens. Together the regions hold all
    tokens before the query, at a cost of order ``n * log(n)``.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      causal: must be True.
      pool, phi: see ``sadsl.summaries``.

    Raises:
      ValueError: ``causal=False``: the published form is causal only.

    Example:
      >>> from sadsl import catalog
      >>> catalog.combiner_logsparse()
      joint(offsets({0}), summaries(tower()))
    """
    if not causal:
        raise ValueError(
            "combiner_logsparse: causal=False is not defined: the regions of a token "
            "follow from the bits of its position, and lie before it; use "
            "combiner_fixed(..., causal=False)"
        )
    return joint(offsets({0}), summaries(tower(), pool, phi))


def combiner_axial_vertical(
    width: int = 32, causal: bool = True, pool: Pool = "max", phi: Phi = "identity"
) -> Joint:
    """On rows of tokens: own row and column directly, a summary of each other column.

    A column's summary covers the tokens above the query's row if ``causal``, else all
    tokens but those of that row.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      width: tokens in a row.
      causal: whether later tokens are hidden.
      pool, phi: see ``sadsl.summaries``.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.combiner_axial_vertical(4))
      joint(blocks(4) & causal(), where(lambda q, k: q % 4 == k % 4) & where(lambda q,
      k: k // 4 < q // 4), summaries(columns(4)))
    """
    return joint(*_cross(width, causal), summaries(columns(width, causal), pool, phi))


def combiner_axial_horizontal(
    width: int = 32, causal: bool = True, pool: Pool = "max", phi: Phi = "identity"
) -> Joint:
    """On rows of tokens: own row and column directly, a summary of each other row.

    A row's summary leaves out the query's column, which is attended to directly. If
    ``causal``, only the rows above are summarised.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      width: tokens in a row.
      causal: whether later tokens are hidden.
      pool, phi: see ``sadsl.summaries``.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.combiner_axial_horizontal(4))
      joint(blocks(4) & causal(), where(lambda q, k: q % 4 == k % 4) & where(lambda q,
      k: k // 4 < q // 4), summaries(rows(4)))
    """
    return joint(*_cross(width, causal), summaries(rows(width, causal), pool, phi))


def combiner_axial_rowmajor(
    width: int = 32, causal: bool = True, key: KeyOf = "proj", proj: str = "proj"
) -> Joint:
    """On rows of tokens: own row directly, a summary of each other row.

    The summary of a row, for a query, is what the token of that row in the query's
    column attends to within the row. See ``sadsl.rowmajor``.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      width: tokens in a row.
      causal: whether later tokens are hidden.
      key: how the key of a summary is made. "proj" learns it from the summary's value,
        as the published layer does; "wsum" needs no function.
      proj: name of the operand that holds the learned function.

    Example:
      >>> from sadsl import catalog
      >>> catalog.combiner_axial_rowmajor(4)
      joint(blocks(4) & causal(), summaries(rowmajor(4)))
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
    """Combines the axial-vertical and the axial-horizontal form on rows of tokens.

    Form "paper" is the mean of the two outputs. Form "code", the published layer, has
    one normaliser over the own row, the column above, the other columns above, and the
    rows above left and right of the query's column: each direct key counts once, and
    the tokens off the row and column twice, by a column and by a row.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      width: tokens in a row.
      form: "paper" or "code".
      causal: whether later tokens are hidden.
      pool, phi: see ``sadsl.summaries``.

    Raises:
      ValueError: there is no such form.
      NotImplementedError: form "code" with ``causal=False``: the published code gives
        weight to empty regions.

    Example:
      >>> from sadsl import catalog
      >>> for part in catalog.combiner_mixture(4).terms:
      ...     print(part)
      joint(blocks(4) & causal(), where(lambda q, k: q % 4 == k % 4) & where(lambda q,
      k: k // 4 < q // 4), summaries(columns(4)))
      joint(blocks(4) & causal(), where(lambda q, k: q % 4 == k % 4) & where(lambda q,
      k: k // 4 < q // 4), summaries(rows(4)))
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
    """A query attends to its own cluster, and to a summary of each other cluster.

    Every token belongs to the cluster of its nearest centroid, so that clusters are
    disjoint and hold all tokens. If ``causal``, a cluster holds the tokens up to the
    query.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021.

    Args:
      num_clusters: clusters of each head.
      causal: whether later tokens are hidden.
      pool, phi: see ``sadsl.summaries``.
      centroids: name of the operand, floats ``[num_q_heads, num_clusters, head_dim]``.
      norm, share_qk: see ``sadsl.kmeans``.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.routing_combiner(4))
      joint(causal() & kmeans(4, members='argmax'), summaries(clusters(kmeans(4,
      members='argmax'))))
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
