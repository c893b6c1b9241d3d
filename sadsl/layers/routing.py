"""Options, keys and loss of the routing layers, shared by both Flax APIs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.catalog.routing_transformer import Variant, routing_transformer
from sadsl.layers.state import ClusterState, commitment, update, update_means
from sadsl.selections.kmeans import Norm, normalized
from sadsl.terms.heads import Heads


class Routed(NamedTuple):
    """Projections of the clustered heads; ``k`` is None where keys are the queries."""

    q: Float[Array, "batch seq heads dim"]
    k: Float[Array, "batch seq heads dim"] | None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How heads are clustered, and how their centroids are learned.

    Roy et al., Efficient content-based sparse attention with Routing Transformers,
    2021, section 4.

    Attributes:
      num_clusters, window, local_window, variant, num_local, share_qk, skip_zeros:
        those of ``sadsl.catalog.routing_transformer``.
      decay, epsilon: those of ``sadsl.layers.state.update``.
      beta: weight of the commitment loss.
      axis_name: a mesh axis (of ``shard_map`` or ``vmap``) whose devices share their
        centroids: all see the tokens of all.

    Example:
      >>> from sadsl.layers.routing import Routing
      >>> print(Routing(num_clusters=2, window=4, local_window=4).spec(num_heads=2))
      heads((causal() & where(lambda q, k: q // 4 - k // 4 <= 1), 1),
      (scatter_mean(causal() & kmeans(2, window=4), sm_scale=1.0), 1))
    """

    num_clusters: int = 8
    window: int | None = 512
    local_window: int = 256
    variant: Variant = "official"
    num_local: int | None = None
    share_qk: bool = True
    skip_zeros: bool = False
    decay: float = 0.999
    epsilon: float = 1e-5
    beta: float = 1e-4
    axis_name: str | None = None

    def num_local_of(self, num_heads: int) -> int:
        """Number of local heads, which come first.

        Raises:
          ValueError: no head is left to be clustered.
        """
        local = num_heads // 2 if self.num_local is None else self.num_local
        if not 0 <= local < num_heads:
            raise ValueError(
                f"num_local={local} of num_heads={num_heads}: at least one head must "
                "be clustered; use SparseAttention for local heads alone"
            )
        return local

    def spec(self, num_heads: int) -> Heads:
        """The spec for a layer of ``num_heads`` heads."""
        return routing_transformer(
            num_heads, self.num_clusters, self.window, self.local_window,
            self.variant, self.num_local_of(num_heads), self.share_qk, self.skip_zeros,
        )  # fmt: skip

    @property
    def norm(self) -> Norm:
        """How vectors are normalised before they are compared with centroids."""
        return "layer" if self.variant == "official" else "unit"

    def attended(
        self,
        q: Float[Array, "batch seq heads dim"],
        k: Float[Array, "batch seq some_heads dim"] | None,
        transform: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    ) -> tuple[Array, Array, Routed]:
        """Queries and keys for attention, and the projections of the clustered heads.

        Args:
          q: queries of all heads.
          k: keys of all heads, or, with ``share_qk``, of the local heads (None if there
            are none): clustered heads take their queries as keys.
          transform: applied to queries and keys of the local heads.
        """
        local = self.num_local_of(q.shape[2])
        routed_q, routed_k = q[:, :, local:], None
        if k is not None and not self.share_qk:
            routed_k = k[:, :, local:]
        if self.variant == "official":
            new_q = normalized(routed_q, "layer")
            new_k = new_q if routed_k is None else normalized(routed_k, "layer")
        else:
            new_q = routed_q
            new_k = normalized(new_q, "unit") if routed_k is None else routed_k
        if local and k is not None:
            near = q[:, :, :local], k[:, :, :local]
            near = near if transform is None else transform(*near)
            new_q = jnp.concatenate([near[0], new_q], axis=2)
            new_k = jnp.concatenate([near[1], new_k], axis=2)
        return new_q, new_k, Routed(routed_q, routed_k)

    def learned(
        self,
        state: ClusterState,
        routed: Routed,
    ) -> tuple[ClusterState, Array]:
        """The centroids after a step, and its commitment loss, f32.

        "official": the mean over tokens of the squared distance to their centroid, for
        queries and for keys, and twice where they are the same. "lucidrains": the mean
        over tokens and features, once. Both are multiplied by ``beta``.
        """
        q, k = routed
        every = [q] if k is None else [q, k]
        vectors = [normalized(jnp.swapaxes(x, 1, 2), self.norm) for x in every]
        both = jnp.concatenate(vectors, axis=2)
        if self.variant == "official":
            losses = [commitment(x, state.means) for x in vectors]
            loss = losses[0] + losses[-1]
            moved = update(
                state, both,
                decay=self.decay, epsilon=self.epsilon, axis_name=self.axis_name,
            )  # fmt: skip
        else:
            loss = commitment(both, state.means) / q.shape[-1]
            moved = update_means(
                state, both, decay=self.decay, axis_name=self.axis_name
            )
        return moved, self.beta * loss
