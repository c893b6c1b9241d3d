"""``clusters``: regions that content decides, the clusters that a query is not in.

Clusters are disjoint. A causal query reads, of each other cluster, the part up to its
own position (Ren et al., Combiner, 2021, section 4.3). Such a part changes only where a
token joins the cluster. So there is one region for each token, *its cluster up to it*,
and a query reads the region of the last token of every cluster up to its position. That
token is in the query's block of positions, or it is the last one of its cluster before
that block. So a block reads the regions of its own tokens, and one listed region for
each cluster. If a block is at least as long as the number of clusters, all lists
together are no longer than the sequence. The time is of order
``n * (clusters + n / clusters)`` and memory is linear, for any labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from typing_extensions import override

from pallas_kernels.precision import widened
from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal as causal_map
from sadsl.maps.named import where
from sadsl.maps.symbols import OperandArray, Symbol, Truth
from sadsl.selections.kmeans import Kmeans
from sadsl.terms.regions import Partition

# Blocks of queries are multiples of this size, like those of kernels.
LEAST_BLOCK = 128
# Names of run-time arrays that no operand of a caller can have.
Q_LABEL, LABEL, UNTIL, SIZE = "regions.q", "regions.k", "regions.until", "regions.size"


@dataclass(frozen=True, repr=False)
class Clusters(Partition):
    """Clusters of a kmeans as regions; see ``clusters``."""

    kmeans: Kmeans
    causal: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.kmeans, Kmeans) or self.kmeans.members != "argmax":
            raise ValueError(
                f"clusters takes kmeans(..., members='argmax'), not {self.kmeans!r}: "
                "regions must be disjoint, each token in one of them"
            )

    @property
    @override
    def support(self) -> IndexMap:
        return causal_map() - self.kmeans if self.causal else ~self.kmeans

    def block(self) -> int:
        """The number of queries that share a list: at least the number of clusters."""
        return -(-self.kmeans.num_clusters // LEAST_BLOCK) * LEAST_BLOCK

    def num_listed(self, n: int) -> int:
        """The length of all lists together; 0 for a single block, which needs none."""
        blocks = -(-n // self.block())
        return blocks * self.kmeans.num_clusters if blocks > 1 else 0

    @override
    def num_regions(self, n: int) -> int:
        if self.causal:
            return self.num_listed(n) + n
        return self.kmeans.num_clusters

    @override
    def members(self, n: int) -> IndexMap:
        """Keys of the region's cluster, up to the region's token if causal."""
        if self.causal:
            # Written with the kmeans itself, so that the kernels sort by its labels.
            return causal_map() & self.kmeans
        return where(lambda q, k, h: OperandArray(LABEL)[h, k] == q)

    @override
    def seen(self, n: int) -> IndexMap:
        if not self.causal:
            mine, count = OperandArray(Q_LABEL), OperandArray(SIZE)
            return where(lambda q, k, h: (mine[h, q] != k) & (count[h, k] > 0))
        listed, block = self.num_listed(n), self.block()
        size = self.kmeans.num_clusters

        def held(q: Symbol, k: Symbol, h: Symbol) -> Truth:
            token = k - listed
            own = (token <= q) & (token // block == q // block)
            if listed:
                mine = (k < listed) & (k // size == q // block)
                own = mine | ((k >= listed) & own)
            other = OperandArray(Q_LABEL)[h, q] != OperandArray(LABEL)[h, k]
            return own & (q < OperandArray(UNTIL)[h, k]) & other

        return where(held)


def clusters(kmeans: Kmeans, causal: bool = True) -> Clusters:
    """The clusters of a kmeans as regions; a query reads all clusters but its own.

    Ren et al., Combiner: full attention transformer with sparse computation cost, 2021,
    section 4.3.

    Args:
      kmeans: ``kmeans(num_clusters, members="argmax")``; its centroids are an operand.
      causal: a query reads each other cluster up to its position. False: it reads whole
        clusters.

    Raises:
      ValueError: ``kmeans`` is not a kmeans with ``members="argmax"``.

    Example:
      >>> import sadsl as sa
      >>> partition = sa.clusters(sa.kmeans(8, members="argmax"))
      >>> partition.support
      causal() - kmeans(8, members='argmax')
    """
    return Clusters(kmeans, bool(causal))


class Order(NamedTuple):
    """The order of tokens by cluster; tokens of a cluster ascend.

    Attributes:
      at: the token in each slot.
      slot: the slot of each token.
      first: whether a slot is the first of its cluster.
    """

    at: Int32[Array, "batch heads n"]
    slot: Int32[Array, "batch heads n"]
    first: Bool[Array, "batch heads n"]


@jax.jit
def order_of(labels: Int32[Array, "batch heads n"]) -> Order:
    """The order of tokens by label."""
    at = jnp.argsort(labels, axis=-1, stable=True)
    ranked = jnp.take_along_axis(labels, at, axis=-1)
    changes = ranked[..., 1:] != ranked[..., :-1]
    first = jnp.concatenate([jnp.ones((*at.shape[:2], 1), bool), changes], -1)
    return Order(at, jnp.argsort(at, axis=-1), first)


@jax.jit
def until(labels: Int32[Array, "batch heads n"], order: Order) -> Array:
    """For each token, the next token of its cluster; ``n`` if there is none.

    Up to there the cluster does not change. 0 for a negative label: no cluster.
    """
    n = labels.shape[-1]
    end = jnp.full((*labels.shape[:2], 1), n, order.at.dtype)
    following = jnp.concatenate([order.at[..., 1:], end], axis=-1)
    last = jnp.concatenate([order.first[..., 1:], jnp.ones_like(end, bool)], axis=-1)
    ranked = jnp.where(last, n, following)
    found = jnp.take_along_axis(ranked, order.slot, axis=-1)
    return jnp.where(labels < 0, 0, found).astype(jnp.int32)


@partial(jax.jit, static_argnames=("partition", "pool"))
def pooled(
    x: Float[Array, "batch n heads dim"],
    labels: Int32[Array, "batch heads n"],
    order: Order,
    *,
    partition: Clusters,
    pool: str,
) -> Float[Array, "batch regions heads dim"]:
    """The pool of the members of each region, in the dtype of ``x``.

    A scan over the tokens in the order of the clusters, restarted at each cluster. A
    region without members yields 0.
    """
    by_head = widened(jnp.swapaxes(x, 1, 2))
    ranked = jnp.take_along_axis(by_head, order.at[..., None], axis=2)
    first = order.first[..., None]
    total = _running(ranked, first, jnp.maximum if pool == "max" else jnp.add)
    if pool == "mean":
        counts = _running(jnp.ones_like(ranked[..., :1]), first, jnp.add)
        total = total / counts
    if partition.causal:
        found = jnp.take_along_axis(total, order.slot[..., None], axis=2)
    else:
        count = partition.kmeans.num_clusters
        last = jnp.cumsum(sizes(labels, count), axis=-1)
        last = last + jnp.sum(labels < 0, axis=-1, keepdims=True) - 1
        found = jnp.take_along_axis(total, jnp.maximum(last, 0)[..., None], axis=2)
        found = jnp.where((sizes(labels, count) > 0)[..., None], found, 0)
    return jnp.swapaxes(found, 1, 2).astype(x.dtype)


def sizes(
    labels: Int32[Array, "batch heads n"], count: int
) -> Int32[Array, "batch heads clusters"]:
    """The number of tokens in each of ``count`` clusters."""
    batch, heads, n = labels.shape
    flat = labels.reshape(-1, n)
    row = jnp.arange(len(flat))[:, None]
    # Tokens without a cluster get an index out of range, which the update drops.
    at = jnp.where(flat < 0, count, flat)
    found = jnp.zeros((len(flat), count), jnp.int32).at[row, at].add(1, mode="drop")
    return found.reshape(batch, heads, count)


def _running(x: Array, first: Array, combine: Any) -> Array:
    """The running pool along axis 2, restarted at each ``first``."""

    def step(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], combine(a[1], b[1]))

    return jax.lax.associative_scan(step, (first, x), axis=2)[1]


@partial(jax.jit, static_argnames="partition")
def tokens_read(
    labels: Int32[Array, "batch heads n"], *, partition: Clusters
) -> Int32[Array, "batch heads regions"]:
    """The token of each region in the summary sequence; -1 for none.

    First the lists: for each block of queries, the last token of each cluster before
    the block. Then all tokens.
    """
    batch, heads, n = labels.shape
    every = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), labels.shape)
    if not partition.num_listed(n):
        return every
    count, block = partition.kmeans.num_clusters, partition.block()
    flat = labels.reshape(-1, n)
    row, token = jnp.arange(len(flat))[:, None], jnp.arange(n)[None, :]
    none = jnp.full((len(flat), -(-n // block), count), -1, jnp.int32)
    # Tokens without a cluster get an index out of range, which the update drops.
    at = row, token // block, jnp.where(flat < 0, count, flat)
    last = none.at[at].max(every.reshape(-1, n), mode="drop")
    before = jax.lax.cummax(last, axis=1)[:, :-1]
    listed = jnp.concatenate([none[:, :1], before], axis=1)
    return jnp.concatenate([listed.reshape(batch, heads, -1), every], axis=-1)


def taken(
    x: Float[Array, "batch n heads dim"], at: Int32[Array, "batch heads regions"]
) -> Float[Array, "batch regions heads dim"]:
    """The vectors of the tokens ``at``; an arbitrary one for -1."""
    if at.shape[-1] == x.shape[1]:
        return x
    index = jnp.swapaxes(jnp.maximum(at, 0), 1, 2)[..., None]
    return jnp.take_along_axis(x, index, axis=1)


def operands_of_members(
    partition: Clusters, labels: Int32[Array, "batch heads n"]
) -> Mapping[str, Array]:
    """The run-time arrays that ``members`` reads."""
    if not partition.causal:
        return {LABEL: labels}
    names = (partition.kmeans.key(name) for name in ("q_label", "k_label"))
    return dict.fromkeys(names, labels)


def operands_of_seen(
    partition: Clusters,
    labels: tuple[Int32[Array, "batch heads n"], Int32[Array, "batch heads n"]],
    order: Order,
    at: Int32[Array, "batch heads regions"],
) -> Mapping[str, Array]:
    """The run-time arrays that ``seen`` reads, made from (query labels, key labels)."""
    mine, other = labels
    if not partition.causal:
        return {Q_LABEL: mine, SIZE: sizes(other, partition.kmeans.num_clusters)}
    index = jnp.maximum(at, 0)
    ends = jnp.take_along_axis(until(other, order), index, axis=-1)
    return {
        Q_LABEL: mine,
        LABEL: jnp.take_along_axis(other, index, axis=-1),
        UNTIL: jnp.where(at < 0, 0, ends),
    }
