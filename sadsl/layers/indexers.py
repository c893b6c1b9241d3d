"""What an indexer learns: index queries, index keys, and weights of its heads.

An indexer scores pairs so that a choice can be made of them (``sadsl.dot``). The spec
says which arrays its score reads; an ``Indexer`` makes them from the layer's input,
which the layer detaches: the indexer learns from its own loss only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.layers.linear_gates import Parameter, constant, kernel, projected
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import STRETCH, Rotary
from sadsl.run.entries import entries
from sadsl.selections.dot_scores import Dot


@dataclass(frozen=True)
class PooledKeys:
    """Keys of one head, each made of ``length`` tokens; of one token if it is 1.

    Attributes:
      length: the tokens of a key.
      gate: whether the weights of a key's tokens are projected from the input, by
        channel, with a learned bias for each place; their mean otherwise.
      overlap: as in ``sadsl.entries``.
      norm: of the keys.
      norm_first: whether the norm goes before pooling.
      rotary: turns each key at the position of its first token.
    """

    length: int = 1
    gate: bool = False
    overlap: bool = False
    norm: RowNorm | None = None
    norm_first: bool = False
    rotary: Rotary | None = None

    def parameters(self, name: str, features: int, dim: int) -> dict[str, Parameter]:
        """The parameters of keys of ``dim`` channels; their names start with ``name``.

        A learned rotation is not among them: it belongs to the layer.
        """
        rows = dim * (2 if self.overlap else 1)
        found = {name: kernel(features, rows)}
        if self.norm is not None:
            found |= self.norm.parameters(f"{name}_norm", dim)
        if self.gate:
            found[f"{name}_gate"] = kernel(features, rows)
            found[f"{name}_place"] = constant(0.0, self.length, rows)
        return found

    def __call__(
        self, name: str, params: Mapping[str, Array], x: Float[Array, "batch seq f"]
    ) -> Float[Array, "batch keys dim"]:
        """The keys; tokens that do not fill a key at the end have none."""
        y = projected(x, params[name])
        if self.norm is not None and self.norm_first:
            y = self.norm(f"{name}_norm", params, y)
        if self.length > 1:
            logits = projected(x, params[f"{name}_gate"]) if self.gate else None
            place = params[f"{name}_place"] if self.gate else None
            y = entries(
                y, logits, length=self.length, position_bias=place, overlap=self.overlap
            )
        if self.norm is not None and not self.norm_first:
            y = self.norm(f"{name}_norm", params, y)
        if self.rotary is not None:
            at = jnp.arange(y.shape[1], dtype=jnp.int32) * self.length
            y = self.rotary(y, at, params)
        return y


@dataclass(frozen=True)
class Indexer:
    """Makes the arrays of a ``dot`` score.

    Attributes:
      num_heads, head_dim: of the index queries.
      query_from: the low-rank query "latent" of the layer, the "input", or the layer
        "norm" of the input.
      query_norm: of each index query.
      rotary: of the index queries.
      keys: how index keys are made.
      scale: a factor of the scores; ``head_dim ** -0.5`` if None. Where the score has
        weights of heads, these get it, and ``num_heads ** -0.5``.
      log_scale: whether index queries have a learned temperature by position.
    """

    num_heads: int
    head_dim: int
    query_from: Literal["latent", "input", "norm"] = "latent"
    query_norm: RowNorm | None = None
    rotary: Rotary | None = None
    keys: PooledKeys = PooledKeys(norm=RowNorm("layer"))
    scale: float | None = None
    log_scale: bool = False

    def parameters(
        self, score: Dot, features: int, latent: int
    ) -> dict[str, Parameter]:
        """The parameters for a score, of a layer with a query latent of that width."""
        width = latent if self.query_from == "latent" else features
        found = {"index_query": kernel(width, self.num_heads, self.head_dim)}
        if self.query_from == "norm":
            found |= RowNorm("layer").parameters("index_input", features)
        if self.query_norm is not None:
            found |= self.query_norm.parameters("index_query_norm", self.head_dim)
        if self.log_scale:
            found["index_log_scale"] = constant(0.0, self.num_heads)
            found["index_log_bias"] = constant(1.0, self.num_heads)
        if score.weights is not None:
            found["index_weight"] = kernel(features, self.num_heads)
        return found | self.keys.parameters("index_key", features, self.head_dim)

    def operands(
        self,
        score: Dot,
        params: Mapping[str, Array],
        x: Float[Array, "batch seq features"],
        latent: Float[Array, "batch seq rank"],
        cells: int | None = None,
    ) -> dict[str, Array]:
        """The arrays that ``score`` reads.

        No gradient flows to ``x``, ``latent`` and the rotation, which are the layer's.

        Args:
          score: the score of a choice.
          params: of the layer.
          x, latent: the layer's input and its query latent.
          cells: the number of rows that keys are padded to; None for no padding.
        """
        x, latent = jax.lax.stop_gradient((x, latent))
        if STRETCH in params:
            stretch = jax.lax.stop_gradient(params[STRETCH])
            params = {**params, STRETCH: stretch}
        at = jnp.arange(x.shape[1], dtype=jnp.int32)
        q = self._queries(params, x, latent)
        if self.rotary is not None:
            q = self.rotary(q, at, params)
        if self.log_scale:
            q = _tempered(q, params["index_log_scale"], params["index_log_bias"])
        k = self.keys("index_key", params, x)
        if cells is not None:
            k = jnp.pad(k, ((0, 0), (0, cells - k.shape[1]), (0, 0)))
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        found = {score.k: k[:, :, None]}
        if score.weights is None:
            return found | {score.q: q * scale}
        weights = projected(x, params["index_weight"])
        weights = weights * (scale * self.num_heads**-0.5)
        return found | {score.q: q, score.weights: weights}

    def _queries(
        self, params: Mapping[str, Array], x: Array, latent: Array
    ) -> Float[Array, "batch seq heads dim"]:
        source = latent if self.query_from == "latent" else x
        if self.query_from == "norm":
            source = RowNorm("layer")("index_input", params, x)
        q = projected(source, params["index_query"])
        if self.query_norm is not None:
            q = self.query_norm("index_query_norm", params, q)
        return q


def _tempered(q: Array, scale: Array, bias: Array) -> Array:
    """Queries times ``scale * ln(position + 1) + bias``, by head."""
    wide_q = widened(q)
    at = jnp.log1p(jnp.arange(q.shape[1], dtype=wide_q.dtype))[None, :, None, None]
    scale, bias = (x.astype(wide_q.dtype)[None, None, :, None] for x in (scale, bias))
    return (wide_q * (scale * at + bias)).astype(q.dtype)
