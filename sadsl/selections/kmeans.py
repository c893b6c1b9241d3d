"""Clusters of queries and keys around centroids: the maps of the Routing Transformer.

Roy et al., Efficient content-based sparse attention with Routing Transformers, 2021.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from typing_extensions import override

from pallas_kernels.precision import widened
from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection

Members = Literal["topw", "argmax"]
Norm = Literal["layer", "unit", "none"]

# A map reads a vector a side and cluster; more are for the averaged term.
MOST_CLUSTERS = 64
LAYER_EPS = 1e-6
# Affinities that are held at once; beyond, heads take turns.
MOST_AFFINITIES = 1 << 25


def normalized(x: Float[Array, "*axes dim"], norm: Norm) -> Float[Array, "*axes dim"]:
    """Vectors as they are compared with centroids, in their dtype.

    "layer": mean 0 and variance 1 over the last axis, without scale or bias, epsilon
    1e-6, so that the length is about ``dim ** 0.5``; "unit": of length 1; "none": as
    they are. A vector of zeros stays one.
    """
    if norm == "none":
        return x
    x_wide = widened(x)
    if norm == "unit":
        square = jnp.sum(x_wide**2, axis=-1, keepdims=True)
        return (x_wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)
    centred = x_wide - x_wide.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + LAYER_EPS)).astype(x.dtype)


def assignments(affinity: Float[Array, "*axes clusters n"]) -> Int32[Array, "*axes n"]:
    """The cluster of the greatest affinity, the lower one of equals.

    Affinities that are NaN or infinite are never chosen; -1 where all of them are.
    """
    found = jnp.argmax(_finite(affinity), axis=-2).astype(jnp.int32)
    return jnp.where(jnp.isfinite(affinity).any(axis=-2), found, -1)


def nearest(
    affinity: Float[Array, "*axes clusters n"], window: int
) -> Int32[Array, "*axes clusters window"]:
    """The ``window`` positions of greatest affinity to each cluster, ascending.

    The lower of equals is taken. Where fewer affinities are finite, ``n`` stands for
    the others.
    """
    found, at = jax.lax.top_k(_finite(affinity), window)
    at = jnp.where(jnp.isneginf(found), affinity.shape[-1], at)
    return jnp.sort(at.astype(jnp.int32), axis=-1)


def _finite(affinity: Array) -> Array:
    # A zero has one sign: some backends rank -0 below 0.
    unsigned = jnp.where(affinity == 0, jnp.zeros_like(affinity), affinity)
    return jnp.where(jnp.isfinite(affinity), unsigned, -jnp.inf)


@dataclass(frozen=True, repr=False)
class Kmeans(NamedSelection):
    """Positions that share a cluster; made by ``kmeans``."""

    num_clusters: int
    window: int | None = None
    members: Members = "topw"
    centroids: str = "centroids"
    norm: Norm = "layer"
    share_qk: bool = True

    def __post_init__(self) -> None:
        at_least("kmeans", "num_clusters", self.num_clusters, 1)
        if self.window is not None:
            at_least("kmeans", "window", self.window, 1)
        for name, known in (("members", Members), ("norm", Norm)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ValueError(
                    f"kmeans: {name}={value!r} must be one of "
                    f"{', '.join(get_args(known))}"
                )
        if not isinstance(self.centroids, str) or not self.centroids.isidentifier():
            raise ValueError(
                f"kmeans: centroids={self.centroids!r} must be the name of an operand, "
                "a Python identifier"
            )
        if self.members == "argmax" and self.window is not None:
            raise ValueError(
                f"kmeans: window={self.window} is the size of a cluster, which "
                "members='argmax' leaves open: leave it None"
            )

    @property
    @override
    def leak(self) -> Leak:  # type: ignore[override]
        """The best ``window`` are taken of all positions, later ones too."""
        return "all" if self.members == "topw" else "none"

    @property
    @override
    def order(self) -> Mapping[str, str]:
        if self.members == "topw":
            return {}
        return {"q": "q_label", "k": "k_label"}

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {self.centroids: 3}

    def size(self, n: int) -> int:
        """The positions in a cluster of a sequence of ``n``.

        Raises:
          ValueError: the window is longer than the sequence.
        """
        window = -(-n // self.num_clusters) if self.window is None else self.window
        if window > n:
            raise ValueError(
                f"kmeans: window={window} exceeds the {n} positions there are: give at "
                "most that, or window=None, which divides them among the clusters"
            )
        return window

    def coverage(self, n: int) -> float:
        """At most this share of ``n`` positions is in a cluster.

        Below 1 (``num_clusters * window < n``) some are in none, and yield 0; mostly
        some are even at 1, since clusters may overlap.
        """
        if self.members == "argmax":
            return 1.0
        return min(1.0, self.num_clusters * self.size(n) / n)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        if self.members == "argmax":
            return self.part("q_label")[h, q] == self.part("k_label")[h, k]
        if self.num_clusters > MOST_CLUSTERS:
            raise NotImplementedError(
                f"{self!r} as a map reads two vectors a cluster, for at most "
                f"{MOST_CLUSTERS}: use scatter_mean(...), which takes any number"
            )
        queries, keys = self.part("q_members"), self.part("k_members")
        return reduce(
            or_,
            (
                (queries[h, c, q] == 1) & (keys[h, c, k] == 1)
                for c in range(self.num_clusters)
            ),
        )

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        if self.members == "argmax":
            q, k = self.of_both(content, assignments)
            # Who is in no cluster shares none with others of that kind.
            return {"q_label": q, "k_label": jnp.where(k < 0, -2, k)}
        q, k = self.slots(content)
        lengths = content.q.shape[2], content.k.shape[2]
        return {
            "q_members": _membership(q, lengths[0]),
            "k_members": _membership(k, lengths[1]),
        }

    def slots(self, content: Content) -> tuple[Array, Array]:
        """The queries and keys of each cluster, int32 ``[batch, heads, clusters, w]``.

        Ascending; the length of the sequence stands for no one.
        """

        def take(affinity: Array) -> Array:
            return nearest(affinity, self.size(affinity.shape[-1]))

        return self.of_both(content, take)

    def of_both(
        self, content: Content, choose: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """What affinities ``[..., clusters, n]`` of queries and of keys yield.

        Raises:
          ValueError: the centroids do not fit, or a shared side has two lengths.
        """
        means = self._means(content)
        found = self._chosen(content.queries(), means, choose)
        if not self.share_qk:
            return found, self._chosen(content.keys(), means, choose)
        if content.q.shape[2] != content.k.shape[2]:
            raise ValueError(
                f"{self!r} clusters positions by their queries, of which there are "
                f"{content.q.shape[2]}, for {content.k.shape[2]} keys: pass "
                "share_qk=False to cluster the keys by themselves"
            )
        return found, found

    def _means(self, content: Content) -> Float[Array, "batch heads clusters dim"]:
        means = content.operand(
            self.centroids, "float centroids [num_q_heads, num_clusters, head_dim]"
        )
        wanted = (content.q.shape[1], self.num_clusters, content.q.shape[3])
        if means.shape[1:] != wanted or not jnp.issubdtype(means.dtype, jnp.floating):
            raise ValueError(
                f"{self.centroids!r} is {means.dtype} of shape {means.shape[1:]}: "
                f"{self!r} needs floats [num_q_heads, num_clusters, head_dim], here "
                f"{wanted}, perhaps with a batch axis in front"
            )
        return means.astype(jnp.float32)

    def _chosen(
        self, x: Array, means: Array, choose: Callable[[Array], Array]
    ) -> Array:
        batch, num_heads, n, _ = x.shape
        x = normalized(x, self.norm)
        means = jnp.broadcast_to(means, (batch, *means.shape[1:]))

        def of_head(head: tuple[Array, Array]) -> Array:
            return choose(jnp.matmul(head[1], head[0].T, precision="highest"))

        rows = x.reshape(-1, *x.shape[2:]), means.reshape(-1, *means.shape[2:])
        at_once = max(1, MOST_AFFINITIES // (self.num_clusters * n))
        every = batch * num_heads <= at_once
        run = jax.vmap(of_head) if every else partial(_mapped, of_head, at_once)
        found = run(rows)
        return found.reshape(batch, num_heads, *found.shape[1:])


def _mapped(function: Callable, at_once: int, rows: tuple[Array, Array]) -> Array:
    return jax.lax.map(function, rows, batch_size=at_once)


def _membership(slots: Array, n: int) -> Bool[Array, "batch heads clusters n"]:
    """Who is in each cluster, from the slots of ``Kmeans.slots``."""
    flat = slots.reshape(-1, slots.shape[-1])
    row = jnp.arange(len(flat))[:, None]
    table = jnp.zeros((len(flat), n), bool).at[row, flat].set(True, mode="drop")
    return table.reshape(*slots.shape[:-1], n)


def kmeans(
    num_clusters: int,
    window: int | None = None,
    members: Members = "topw",
    centroids: str = "centroids",
    norm: Norm = "layer",
    share_qk: bool = True,
) -> Kmeans:
    """Pairs whose query and key are in one cluster, by their affinity to centroids.

    The affinity of a position to a cluster is the product of its query (or key), after
    ``norm``, with the cluster's centroid, in float32. The centroids are an operand,
    floats ``[num_q_heads, num_clusters, head_dim]``, perhaps with a batch axis. As a
    map it is one softmax over the union of the clusters; ``scatter_mean`` averages a
    softmax a cluster, as the Routing Transformer does (Roy et al., 2021).

    Args:
      num_clusters: clusters of every head.
      window: positions in each, by the greatest affinity of all: a position may be in
        none or in several. ``ceil(n / num_clusters)`` if None.
      members: "topw"; or "argmax": a position is in the cluster it is nearest to, and
        clusters have any size.
      centroids: the name of the operand.
      norm: "layer" (published code), "unit", or "none": see ``normalized``.
      share_qk: positions are clustered by their queries alone, so that a cluster has
        the same queries and keys; else keys by themselves.

    Raises:
      ValueError: (in a call) the window exceeds the length, or the centroids are not
        given or of another shape.
    """
    return Kmeans(num_clusters, window, members, centroids, norm, bool(share_qk))
