"""Selects keys that are in the same k-means cluster as the query.

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
from sadsl.maps.operand_names import check_operand_name
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection

Members = Literal["topw", "argmax"]
Norm = Literal["layer", "unit", "none"]

# As a map, each cluster is two vectors of bools; `scatter_mean` takes more clusters.
MOST_CLUSTERS = 64
LAYER_EPS = 1e-6
# The number of affinities in memory at a time; heads take turns beyond it.
MOST_AFFINITIES = 1 << 25


def normalized(x: Float[Array, "*axes dim"], norm: Norm) -> Float[Array, "*axes dim"]:
    """Normalises vectors for the comparison with centroids; keeps their dtype.

    "layer": to mean 0 and variance 1 over the last axis, without scale or bias, with
    epsilon 1e-6, so that the length is about ``dim ** 0.5``; "unit": to length 1;
    "none": not at all. A vector of zeros stays as it is.
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
    """The cluster of the greatest affinity of each position; ties go to the lower one.

    An affinity of NaN or infinity is never chosen; the result is -1 where all are.
    """
    found = jnp.argmax(_finite(affinity), axis=-2).astype(jnp.int32)
    return jnp.where(jnp.isfinite(affinity).any(axis=-2), found, -1)


def nearest(
    affinity: Float[Array, "*axes clusters n"], window: int
) -> Int32[Array, "*axes clusters window"]:
    """The ``window`` positions of the greatest affinity to each cluster, ascending.

    Ties go to the lower position. Where fewer affinities are finite, the other entries
    are ``n``.
    """
    found, at = jax.lax.top_k(_finite(affinity), window)
    at = jnp.where(jnp.isneginf(found), affinity.shape[-1], at)
    return jnp.sort(at.astype(jnp.int32), axis=-1)


def _finite(affinity: Array) -> Array:
    # -0 must equal 0: some backends rank it lower.
    unsigned = jnp.where(affinity == 0, jnp.zeros_like(affinity), affinity)
    return jnp.where(jnp.isfinite(affinity), unsigned, -jnp.inf)


@dataclass(frozen=True, repr=False)
class Kmeans(NamedSelection):
    """A query sees the keys of its clusters; made by ``kmeans``."""

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
        check_operand_name("kmeans: centroids", self.centroids)
        if self.members == "argmax" and self.window is not None:
            raise ValueError(
                f"kmeans: window={self.window} is the size of a cluster, but with "
                "members='argmax' clusters have any size: leave it None"
            )

    @property
    @override
    def leak(self) -> Leak:  # type: ignore[override]
        """The "topw" members are the best of all positions, also of later ones."""
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
        """The number of positions in a cluster of a sequence of ``n``.

        Raises:
          ValueError: ``window`` is longer than the sequence.
        """
        window = -(-n // self.num_clusters) if self.window is None else self.window
        if window > n:
            raise ValueError(
                f"kmeans: window={window} exceeds the {n} positions there are: give at "
                "most that, or window=None for ceil(n / num_clusters)"
            )
        return window

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        if self.members == "argmax":
            return self.part("q_label")[h, q] == self.part("k_label")[h, k]
        if self.num_clusters > MOST_CLUSTERS:
            raise NotImplementedError(
                f"{self!r} as a map takes at most {MOST_CLUSTERS} clusters, since each "
                "one reads two arrays: use scatter_mean(...), which takes any number"
            )
        queries, keys = self.part("q_members"), self.part("k_members")
        return reduce(
            or_,
            (
                (queries[h, c, q] == 1) & (keys[h, c, k] == 1)
                for c in range(self.num_clusters)
            ),
        )

    @property
    @override
    def by_token(self) -> bool:
        return self.members == "argmax"

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        if self.members == "argmax":
            q, k = self.of_both(content, assignments)
            # A query and a key that are in no cluster must not meet: -1 and -2 differ.
            return {"q_label": q, "k_label": jnp.where(k < 0, -2, k)}
        q, k = self.slots(content)
        lengths = content.q.shape[2], content.k.shape[2]
        return {
            "q_members": _membership(q, lengths[0]),
            "k_members": _membership(k, lengths[1]),
        }

    def slots(self, content: Content) -> tuple[Array, Array]:
        """The queries and keys of each cluster, int32 ``[batch, heads, clusters, w]``.

        Positions ascend. An entry equal to the length of the sequence is empty.
        """

        def take(affinity: Array) -> Array:
            return nearest(affinity, self.size(affinity.shape[-1]))

        return self.of_both(content, take)

    def of_both(
        self, content: Content, choose: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Applies ``choose`` to the affinities ``[..., clusters, n]`` of q and of k.

        Raises:
          ValueError: the centroids do not fit, or q and k share their clusters but
            differ in length.
        """
        means = self._means(content)
        found = self._chosen(content.queries(), means, choose)
        if not self.share_qk:
            return found, self._chosen(content.keys(), means, choose)
        if content.q.shape[2] != content.k.shape[2]:
            raise ValueError(
                f"{self!r} clusters positions by their queries, but there are "
                f"{content.q.shape[2]} queries and {content.k.shape[2]} keys: pass "
                "share_qk=False to cluster the keys by themselves"
            )
        return found, found

    def _means(self, content: Content) -> Float[Array, "batch heads clusters dim"]:
        """The centroids, checked, float32."""
        means = content.operand(
            self.centroids, "float centroids [num_q_heads, num_clusters, head_dim]"
        )
        wanted = (content.q.shape[1], self.num_clusters, content.q.shape[3])
        if means.shape[1:] != wanted or not jnp.issubdtype(means.dtype, jnp.floating):
            raise ValueError(
                f"operand {self.centroids!r} is {means.dtype} of shape "
                f"{means.shape[1:]} without its batch axis: {self!r} needs floats "
                f"[num_q_heads, num_clusters, head_dim], here {wanted}"
            )
        return means.astype(jnp.float32)

    def _chosen(
        self, x: Array, means: Array, choose: Callable[[Array], Array]
    ) -> Array:
        """Applies ``choose`` to the affinities of ``x``, ``[batch, heads, n, dim]``."""
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
    """The members of each cluster as bools, from the positions of ``Kmeans.slots``."""
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
    """A query sees the keys that are in one of its clusters.

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021. The affinity of a position to a cluster is the product of its query (or key),
    after ``norm``, with the centroid of the cluster, in float32. The centroids are an
    operand, floats ``[num_q_heads, num_clusters, head_dim]``. As a map, it is one
    softmax over the union of the clusters; the Routing Transformer averages one softmax
    for each cluster, which is ``scatter_mean``. The choice has no form as lists: with
    "argmax" a cluster may hold every key, and with "topw" so may all clusters of a
    query together.

    Args:
      num_clusters: the number of clusters in each head.
      window: with "topw", the number of positions in a cluster;
        ``ceil(n / num_clusters)`` if None.
      members: "topw": a cluster has the positions of the greatest affinity to it, so
        that a position may be in none or in several. "argmax": a position is in its
        nearest cluster, and clusters have any size.
      centroids: the name of the operand.
      norm: how vectors are normalised: "layer" (as in the published code), "unit" or
        "none".
      share_qk: cluster positions by their queries alone, so that a cluster has the
        same queries and keys; if False, cluster keys by themselves.

    Raises:
      ValueError: an argument is not one of these; in a call, ``window`` exceeds the
        length, or the centroids are missing or of another shape.

    Example:
      >>> import sadsl as sa
      >>> spec = sa.kmeans(2, members="argmax")
      >>> labels = {spec.key("q_label"): [[0, 1, 0]], spec.key("k_label"): [[0, 1, 0]]}
      >>> print(spec.dense(3, operands=labels)[0].astype(int))
      [[1 0 1]
       [0 1 0]
       [1 0 1]]
    """
    return Kmeans(num_clusters, window, members, centroids, norm, bool(share_qk))
