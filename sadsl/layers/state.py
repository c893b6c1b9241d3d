"""Centroids that are learned from the tokens they attract, without gradients.

Pure functions, which the layers of both Flax APIs call. Vectors are ``[batch, heads, n,
dim]``, normalised as ``normalized`` of ``kmeans`` does. A vector of zeros is padding
and counts nowhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.loops import repeat
from sadsl.selections.kmeans import Norm, assignments, normalized


class ClusterState(NamedTuple):
    """The centroids of every head, and the moving sums that they are made from."""

    means: Float32[Array, "heads clusters dim"]
    counts: Float32[Array, "heads clusters"]
    sums: Float32[Array, "heads clusters dim"]


def initial(
    key: Array, num_heads: int, num_clusters: int, head_dim: int, norm: Norm = "layer"
) -> ClusterState:
    """Random normalised centroids; with counts of 1, the sums equal the centroids."""
    shape = num_heads, num_clusters, head_dim
    means = normalized(jax.random.normal(key, shape, jnp.float32), norm)
    # A copy, so that a caller may donate the buffers of all three arrays.
    return ClusterState(means, jnp.ones(shape[:2], jnp.float32), jnp.copy(means))


def assign(
    x: Float[Array, "batch heads n dim"], means: Float[Array, "heads clusters dim"]
) -> Array:
    """The nearest cluster of every token, ``[batch, heads, n]``; -1 for padding."""
    wide = x.astype(jnp.float32)
    affinity = jnp.einsum("bhnd,hcd->bhcn", wide, means, precision="highest")
    return jnp.where(jnp.any(x != 0, axis=-1), assignments(affinity), -1)


def gathered(
    x: Float[Array, "batch heads n dim"],
    means: Float[Array, "heads clusters dim"],
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """Counts ``[heads, clusters]`` and sums of the tokens that each cluster attracts.

    With ``axis_name``, they are summed over all devices of that mesh axis.
    """
    label = assign(x, means)
    member = jax.nn.one_hot(label, means.shape[1], dtype=jnp.float32)
    wide = jnp.where((label >= 0)[..., None], x.astype(jnp.float32), 0)
    counts = member.sum(axis=(0, 2))
    sums = jnp.einsum("bhnc,bhnd->hcd", member, wide, precision="highest")
    if axis_name is None:
        return counts, sums
    return jax.lax.psum((counts, sums), axis_name)


def update(
    state: ClusterState,
    x: Float[Array, "batch heads n dim"],
    *,
    decay: float = 0.999,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> ClusterState:
    """One step of the moving averages, and the centroids that follow from them.

    The counts and sums of the step move ``counts`` and ``sums`` by ``1 - decay``. Then
    ``means = sums / ((counts + epsilon) / (N + clusters * epsilon) * N)``, with ``N``
    all counts of a head (van den Oord et al., Neural discrete representation learning,
    2017, appendix A.1; as the Routing Transformer's published code has it). A centroid
    that attracts nothing stays where it is while its count exceeds epsilon.
    """
    frozen = jax.lax.stop_gradient((x, state))
    found = gathered(frozen[0], frozen[1].means, axis_name)
    counts, sums = (
        decay * old + (1 - decay) * new
        for old, new in zip(frozen[1][1:], found, strict=True)
    )
    total = counts.sum(axis=-1, keepdims=True)
    smooth = (counts + epsilon) / (total + counts.shape[-1] * epsilon) * total
    return ClusterState(sums / smooth[..., None], counts, sums)


def update_means(
    state: ClusterState,
    x: Float[Array, "batch heads n dim"],
    *,
    decay: float = 0.999,
    axis_name: str | None = None,
) -> ClusterState:
    """Moves centroids by ``1 - decay`` towards the direction of their members' sum.

    A centroid without members stays (Wang, routing-transformer, 2020). Counts and sums
    are left as they are.
    """
    x, state = jax.lax.stop_gradient((x, state))
    counts, sums = gathered(x, state.means, axis_name)
    target = jnp.where((counts > 0)[..., None], normalized(sums, "unit"), state.means)
    return state._replace(means=decay * state.means + (1 - decay) * target)


def lloyd(
    key: Array,
    x: Float[Array, "batch heads n dim"],
    num_clusters: int,
    steps: int = 10,
    axis_name: str | None = None,
) -> ClusterState:
    """Fits unit centroids to a first batch: sampled tokens, then Lloyd's iterations.

    Args:
      key: which tokens start as centroids; the same for all devices of an axis.
      x: unit vectors.
      num_clusters: at most ``batch * n``.
      steps: iterations; a centroid without members stays in each.
      axis_name: a mesh axis over which members are summed. The first device's tokens
        are the start.

    Raises:
      ValueError: there are fewer tokens than clusters.
    """
    tokens = jnp.moveaxis(x.astype(jnp.float32), 1, 0).reshape(
        x.shape[1], -1, x.shape[3]
    )
    if tokens.shape[1] < num_clusters:
        raise ValueError(
            f"num_clusters={num_clusters} exceeds the {tokens.shape[1]} tokens of the "
            "batch that they start from: give a larger batch"
        )
    at = jax.random.permutation(key, tokens.shape[1])[:num_clusters]
    means = tokens[:, at]
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) == 0
        means = jax.lax.psum(jnp.where(first, means, 0), axis_name)
    state = ClusterState(means, jnp.ones(means.shape[:2], jnp.float32), means)

    def step(_: int, state: ClusterState) -> ClusterState:
        return update_means(state, x, decay=0.0, axis_name=axis_name)

    state = repeat(steps, step, state)
    return state._replace(sums=jnp.copy(state.means))


def commitment(
    x: Float[Array, "batch heads n dim"], means: Float[Array, "heads clusters dim"]
) -> Float32[Array, ""]:
    """The mean squared distance of tokens from their centroids, f32.

    The mean is over batch, heads and tokens; padding does not count. The gradient flows
    to the tokens, not to the centroids.
    """
    means = jax.lax.stop_gradient(means)
    label = assign(jax.lax.stop_gradient(x), means)
    of_head = jnp.arange(means.shape[0]).reshape(1, -1, 1)
    own = means[of_head, jnp.maximum(label, 0)]
    distance = jnp.where((label >= 0)[..., None], x.astype(jnp.float32) - own, 0)
    number = jnp.sum(label >= 0, dtype=jnp.float32)
    return jnp.sum(distance**2) / jnp.maximum(number, 1)
