"""BERT4Rec: a bidirectional encoder that predicts masked items, for any spec.

Sun et al., BERT4Rec: sequential recommendation with bidirectional encoder
representations from transformer, 2019. Dropout is on hidden states only, so that specs
without attention weights train alike.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sadsl as sa
from sadsl.layers.nnx import SparseAttention
from sadsl.terms.base import Spec
from sadsl.terms.linear import Linear
from sadsl.terms.mixtures import Average, Gated, Joint

from .data import PADDING, Batch

EMBED = nnx.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; the defaults are those of the paper's small models."""

    num_layers: int = 2
    num_heads: int = 2
    d_model: int = 64
    length: int = 32
    dropout: float = 0.2
    impl: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.length < 2:
            raise ValueError(f"--length={self.length} must be at least 2")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"--d_model={self.d_model} must be a multiple of --num_heads="
                f"{self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout} must be in [0, 1)")


def without_padding(spec: Spec) -> Spec:
    """The spec among real items only: each of its maps also asks for equal segments.

    Raises:
      ValueError: a part of it is no map, softmax, linear term or mixture of these.
    """
    match spec:
        case sa.IndexMap():
            return sa.segments() if spec == sa.full() else spec & sa.segments()
        case sa.Softmax() | Linear():
            inner = without_padding(spec.map)
            assert isinstance(inner, sa.IndexMap)
            return replace(spec, map=inner)
        case Joint() | Average() | Gated():
            return replace(spec, terms=tuple(without_padding(x) for x in spec.terms))
    raise ValueError(
        f"--spec={spec!r}: padding can be hidden from maps, softmax, linear and "
        "mixtures of them: write it with these"
    )


class Layer(nnx.Module):
    """Attention and an MLP, each added and normalised after, as in BERT."""

    def __init__(self, sizes: Sizes, spec: Spec, rngs: nnx.Rngs) -> None:
        width = sizes.d_model
        self.attention = SparseAttention(
            spec, sizes.num_heads, width,
            use_bias=True, impl=sizes.impl, rngs=rngs,
        )  # fmt: skip
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(sizes.dropout)

    def __call__(
        self, x: jax.Array, ids: jax.Array, rngs: nnx.Rngs | None
    ) -> jax.Array:
        """Maps ``[batch, length, d_model]`` to the same shape."""
        rest = {"deterministic": rngs is None, "rngs": rngs}
        found = self.attention(x, q_segment_ids=ids, kv_segment_ids=ids)
        x = self.norms[0](x + self.dropout(found, **rest))
        found = self.down(nnx.gelu(self.up(x)))
        return self.norms[1](x + self.dropout(found, **rest))


class Recommender(nnx.Module):
    """Hidden states of a history, and the logits of all tokens from them."""

    def __init__(
        self, sizes: Sizes, spec: Spec, num_tokens: int, rngs: nnx.Rngs
    ) -> None:
        width = sizes.d_model
        self.items = nnx.Embed(num_tokens, width, embedding_init=EMBED, rngs=rngs)
        self.places = nnx.Embed(sizes.length, width, embedding_init=EMBED, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(sizes.dropout)
        self.layers = nnx.List(
            Layer(sizes, without_padding(spec), rngs) for _ in range(sizes.num_layers)
        )
        self.project = nnx.Linear(width, width, rngs=rngs)
        self.project_norm = nnx.LayerNorm(width, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(num_tokens))

    def encoded(self, tokens: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps integers ``[batch, length]`` to ``[batch, length, d_model]``.

        There is no dropout without ``rngs``.
        """
        x = self.items(tokens) + self.places.embedding[...][None]
        x = self.dropout(self.norm(x), deterministic=rngs is None, rngs=rngs)
        # Real items are one document and padding is another.
        ids = (tokens == PADDING).astype(jnp.int32)
        for layer in self.layers:
            x = layer(x, ids, rngs)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states to logits, by the embeddings of the items."""
        x = self.project_norm(nnx.gelu(self.project(x)))
        return x @ self.items.embedding[...].T + self.bias[...]


def cloze_loss(model: Recommender, batch: Batch, key: jax.Array) -> jax.Array:
    """The mean cross-entropy of the masked items."""
    tokens, places, targets = batch
    x = model.encoded(tokens, nnx.Rngs(dropout=key))
    logits = model.logits(jnp.take_along_axis(x, places[..., None], axis=1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    masked = targets != PADDING
    return jnp.where(masked, losses, 0).sum() / masked.sum()
