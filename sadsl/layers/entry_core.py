"""The attention of DeepSeek-V4: keys that are values, and compressed entries."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.layers.indexed_cores import CoreInputs, Params, joined_heads
from sadsl.layers.indexers import PooledKeys
from sadsl.layers.linear_gates import Parameter, kernel, projected
from sadsl.layers.norms import RowNorm, unit_rows
from sadsl.layers.rotary import Rotary
from sadsl.terms.base import LayerSizes, Term

SOURCE = "entries"


@dataclass(frozen=True)
class EntryCore:
    """Queries of low rank, one key head whose keys are values, and entries of tokens.

    Values carry the rotation of their keys, so the output is turned back by that of the
    query: what a value adds then depends on the distance. The output is projected by
    groups of heads first.

    Attributes:
      num_heads: query heads.
      head_dim: channels of a head.
      q_rank: channels of the latent of queries.
      rotary: of queries, keys and outputs.
      entries: makes the entries; None where the spec reads none.
      groups, out_rank: groups of heads, and the channels that each is projected to.
      norm: of the latent and of the keys.

    Raises:
      ValueError: the groups do not divide the heads.
    """

    num_heads: int
    head_dim: int
    q_rank: int
    rotary: Rotary
    entries: PooledKeys | None
    groups: int
    out_rank: int
    norm: RowNorm = field(default_factory=RowNorm)

    def __post_init__(self) -> None:
        if self.groups < 1 or self.num_heads % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide num_heads={self.num_heads}: the "
                "output is projected by groups of heads"
            )

    @property
    def sizes(self) -> LayerSizes:
        """The sizes on which learned arrays depend."""
        return LayerSizes(self.num_heads, 1, self.head_dim, self.head_dim)

    def latent_width(self, features: int) -> int:
        """The width of what index queries are made of."""
        del features
        return self.q_rank

    def parameters(self, features: int, out_features: int) -> dict[str, Parameter]:
        """The projections, the norms, and what makes entries."""
        of_group = self.num_heads // self.groups, self.head_dim, self.out_rank
        found = {
            "query_latent": kernel(features, self.q_rank),
            **self.norm.parameters("query_norm", self.q_rank),
            "query": kernel(self.q_rank, self.num_heads, self.head_dim),
            "key": kernel(features, self.head_dim),
            **self.norm.parameters("key_norm", self.head_dim),
        }
        if self.entries is not None:
            found |= self.entries.parameters("entry", features, self.head_dim)
        start = jax.nn.initializers.lecun_normal((1, 2), 3, batch_axis=0)
        found["out_group"] = Parameter((self.groups, *of_group), start)
        found["out"] = kernel(self.groups, self.out_rank, out_features, inputs=2)
        return found | self.rotary.parameters()

    def inputs(
        self, params: Params, x: Float[Array, "batch seq features"]
    ) -> CoreInputs:
        """The arrays of a call; the entries go by the name "entries"."""
        latent = projected(x, params["query_latent"])
        latent = self.norm("query_norm", params, latent)
        q = unit_rows(projected(latent, params["query"]), self.norm.eps)
        kv = projected(x, params["key"])
        kv = self.norm("key_norm", params, kv)[:, :, None]
        at = jnp.arange(x.shape[1], dtype=jnp.int32)
        q, kv = self.rotary(q, at, params), self.rotary(kv, at, params)
        own, keys = {}, kv
        if self.entries is not None:
            keys = self.entries("entry", params, x)[:, :, None]
            own = {SOURCE: keys}
        return CoreInputs(q, kv, kv, latent, own, keys.shape[1])

    def scored(
        self, made: CoreInputs, term: Term, operands: Params
    ) -> tuple[Array, Array]:
        """The queries and the keys of which the indexer chooses: the entries."""
        del term, operands
        return made.q, made.operands.get(SOURCE, made.k)

    def output(self, params: Params, out: Array) -> Array:
        """The outputs of all heads, turned back, as features."""
        at = jnp.arange(out.shape[1], dtype=jnp.int32)
        out = self.rotary(out, at, params, back=True)
        shape = (*out.shape[:2], self.groups, -1)
        weight = params["out_group"].reshape(self.groups, -1, self.out_rank)
        low = jnp.einsum("bsgi,gir->bsgr", out.reshape(shape), weight.astype(out.dtype))
        return joined_heads(low, params["out"])
