"""The attention in layers with an indexer: grouped heads, or latents (MLA).

A core is a frozen value. It lists its parameters, projects the layer's input to the
arrays of a call, and maps the output of the call back to features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering.problem import Problem
from sadsl.layers.linear_gates import Parameter, kernel, projected
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary
from sadsl.run.latent import LatentSizes, absorbed
from sadsl.run.query_scale import scaled
from sadsl.terms.base import LayerSizes, Term
from sadsl.terms.latent import Latent
from sadsl.terms.softmax import Softmax

Params: TypeAlias = Mapping[str, Array]


class CoreInputs(NamedTuple):
    """The arrays of a call.

    Attributes:
      q, k, v: as in ``sadsl.attention``.
      latent: what index queries may be made of, ``[batch, seq, rank]``.
      operands: what the core gives besides.
      num_keys: how many keys there are to choose from.
    """

    q: Array
    k: Array
    v: Array
    latent: Array
    operands: Mapping[str, Array]
    num_keys: int


@dataclass(frozen=True)
class GroupedCore:
    """Query heads in groups that share key heads.

    Attributes:
      num_heads, num_kv_heads: query heads; heads of keys and values.
      head_dim: channels of a head.
      norm: of each query and each key, before the rotation; None for none.
      rotary: of queries and keys.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: RowNorm | None = None
    rotary: Rotary | None = None

    @property
    def sizes(self) -> LayerSizes:
        """The sizes on which learned arrays depend."""
        return LayerSizes(
            self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim
        )

    def latent_width(self, features: int) -> int:
        """The width of what index queries are made of: the input itself."""
        return features

    def parameters(self, features: int, out_features: int) -> dict[str, Parameter]:
        """The projections, the norms, and the rotation if it is learned."""
        keys = self.num_kv_heads, self.head_dim
        found = {
            "query": kernel(features, self.num_heads, self.head_dim),
            "key": kernel(features, *keys),
            "value": kernel(features, *keys),
            "out": kernel(self.num_heads, self.head_dim, out_features, inputs=2),
        }
        if self.norm is not None:
            found |= self.norm.parameters("query_norm", self.head_dim)
            found |= self.norm.parameters("key_norm", self.head_dim)
        return found | ({} if self.rotary is None else self.rotary.parameters())

    def inputs(
        self, params: Params, x: Float[Array, "batch seq features"]
    ) -> CoreInputs:
        """The arrays of a call."""
        q, k, v = (projected(x, params[name]) for name in ("query", "key", "value"))
        if self.norm is not None:
            q = self.norm("query_norm", params, q)
            k = self.norm("key_norm", params, k)
        if self.rotary is not None:
            at = jnp.arange(x.shape[1], dtype=jnp.int32)
            q, k = self.rotary(q, at, params), self.rotary(k, at, params)
        return CoreInputs(q, k, v, x, {}, k.shape[1])

    def scored(
        self, made: CoreInputs, term: Term, operands: Params
    ) -> tuple[Array, Array]:
        """The queries and keys whose products are the logits."""
        assert isinstance(term, Softmax)
        return _scaled(made.q, term, operands), made.k

    def output(self, params: Params, out: Array) -> Array:
        """The outputs of all heads as features."""
        return joined_heads(out, params["out"])


@dataclass(frozen=True)
class LatentCore:
    """Multi-head latent attention; see ``sadsl.latent``.

    Attributes:
      num_heads: query heads.
      rank: channels of the latent of keys and values, r.
      head_dim: channels of a key that are made of the latent, d_n.
      head_dim_v: channels of a value, d_v.
      q_rank: channels of the latent of queries; None: q is projected at full rank.
      rotary: of the last channels of queries, and of the key part that all heads share;
        None: there is no such part.
      norm: of both latents.
    """

    num_heads: int
    rank: int
    head_dim: int
    head_dim_v: int
    q_rank: int | None = None
    rotary: Rotary | None = None
    norm: RowNorm = field(default_factory=RowNorm)

    @property
    def turned(self) -> int:
        """The channels of the shared, rotated part, d_r."""
        return 0 if self.rotary is None else self.rotary.channels

    @property
    def sizes(self) -> LayerSizes:
        """The sizes on which learned arrays depend."""
        return LayerSizes(
            self.num_heads, 1, self.head_dim + self.turned, self.head_dim_v
        )

    def latent_width(self, features: int) -> int:
        """The width of what index queries are made of."""
        return features if self.q_rank is None else self.q_rank

    def parameters(self, features: int, out_features: int) -> dict[str, Parameter]:
        """The projections, the norms, and the rotation if it is learned."""
        found = {}
        if self.q_rank is not None:
            found["query_latent"] = kernel(features, self.q_rank)
            found |= self.norm.parameters("query_norm", self.q_rank)
        width = self.latent_width(features)
        found["query"] = kernel(width, self.num_heads, self.head_dim + self.turned)
        found["latent"] = kernel(features, self.rank + self.turned)
        found |= self.norm.parameters("latent_norm", self.rank)
        both = self.head_dim + self.head_dim_v
        start = jax.nn.initializers.lecun_normal(2, (0, 1))
        found["kv_b"] = Parameter((self.num_heads, both, self.rank), start)
        found["out"] = kernel(self.num_heads, self.head_dim_v, out_features, inputs=2)
        return found | ({} if self.rotary is None else self.rotary.parameters())

    def inputs(
        self, params: Params, x: Float[Array, "batch seq features"]
    ) -> CoreInputs:
        """The arrays of a call; the up-projection goes by the name "kv_b"."""
        latent = x
        if self.q_rank is not None:
            latent = projected(x, params["query_latent"])
            latent = self.norm("query_norm", params, latent)
        q = projected(latent, params["query"])
        row = projected(x, params["latent"])
        known = self.norm("latent_norm", params, row[..., : self.rank])
        kv = jnp.concatenate([known, row[..., self.rank :]], axis=-1)[:, :, None]
        if self.rotary is not None:
            at = jnp.arange(x.shape[1], dtype=jnp.int32)
            q, kv = self.rotary(q, at, params), self.rotary(kv, at, params)
        up = {"kv_b": params["kv_b"].astype(x.dtype)}
        return CoreInputs(q, kv, kv, latent, up, kv.shape[1])

    def scored(
        self, made: CoreInputs, term: Term, operands: Params
    ) -> tuple[Array, Array]:
        """The queries and keys whose products are the logits, in the absorbed form."""
        assert isinstance(term, Latent)
        sizes = LatentSizes(
            self.num_heads, self.head_dim, self.turned, self.head_dim_v, self.rank
        )
        q = _scaled(made.q, term.softmax, operands)
        return absorbed(q, operands["kv_b"], sizes), made.k

    def output(self, params: Params, out: Array) -> Array:
        """The outputs of all heads as features."""
        return joined_heads(out, params["out"])


def _scaled(q: Array, term: Softmax, operands: Params) -> Array:
    """The queries times the ``scale`` of a softmax."""
    if term.scale is None:
        return q
    problem = Problem(q.shape[1], q.shape[1], q.shape[2], 0)
    return scaled(q, term.scale, problem, operands)


def joined_heads(out: Array, weight: Array) -> Float[Array, "batch seq features"]:
    """``out [batch, seq, heads, dim]`` through one linear map of all heads."""
    flat = out.reshape(*out.shape[:2], -1)
    weight = weight.reshape(-1, weight.shape[-1])
    return jnp.matmul(flat, weight.astype(flat.dtype))
