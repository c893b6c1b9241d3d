"""A decoder: embedding, blocks of attention and MLP behind RMSNorm, head."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sadsl as sa
from sadsl.layers.nnx import RoutingAttention, SparseAttention
from sadsl.layers.routing import Routing
from sadsl.terms.base import Spec as MapOrTerm

# What a model is trained with: a map, a term, or clusters that it learns.
Spec: TypeAlias = MapOrTerm | Routing
# The name of a spec that is a layer of its own.
ROUTING = "routing"

NUM_BYTES = 256
DTYPES = ("float32", "bfloat16")
BITS_PER_NAT = 1.4426950408889634
ZEROS = nnx.initializers.zeros_init()


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, without what a spec learns of its own.

    ``dtype`` is that of activations: "float32" or "bfloat16". Parameters, logits and
    the loss are float32 always. ``dropout_rate`` is the share of the attention weights
    that is dropped in training.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_model: int
    d_hidden: int
    dropout_rate: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        counts = "num_layers", "num_heads", "num_kv_heads", "d_model", "d_hidden"
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 2 * num_heads="
                f"{2 * self.num_heads}: rotary positions turn pairs of features"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} must be at least 0 and less than 1"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {DTYPES}")


def rotary(
    q: jax.Array, k: jax.Array, positions: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rotates pairs of features by angles that grow with the position.

    Scores then depend on the distance alone (Su et al., RoFormer, 2021, section 3.2).
    Both arrays are ``[batch, seq, heads, head_dim]``. Positions ``[seq]`` count from 0
    if None.
    """
    at = jnp.arange(q.shape[1]) if positions is None else positions
    return _rotate(q, at), _rotate(k, at)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
    cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x.dtype)


def routing_for(seq_len: int) -> Routing:
    """Options for routing: half of the heads cluster 128 positions, half are local."""
    clusters = max(2, seq_len // 128)
    window = -(-seq_len // clusters)
    return Routing(num_clusters=clusters, window=window, local_window=window)


def spec_of(text: str, seq_len: int) -> Spec:
    """The spec whose ``repr`` is ``text``, in a model trained on ``seq_len`` bytes."""
    routing = routing_for(seq_len)
    return routing if text == repr(routing) else sa.parse(text)


def text_of(spec: Spec) -> str:
    """The text of a spec, or its name."""
    return ROUTING if isinstance(spec, Routing) else repr(spec)


def attention_layer(
    config: ModelConfig,
    spec: Spec,
    rngs: nnx.Rngs,
    mesh_axes: sa.MeshAxes | None = None,
) -> nnx.Module:
    """The layer of a spec, with rotary positions but for heads that cluster by content.

    With ``mesh_axes``, what devices send each other follows from the spec. Routing
    layers leave that to XLA.

    Raises:
      ValueError: routing with fewer key heads than query heads, or with dropout.
    """
    if not isinstance(spec, Routing):
        return SparseAttention(
            spec, config.num_heads, config.d_model,
            num_kv_heads=config.num_kv_heads, dtype=config.dtype, transform_qk=rotary,
            dropout_rate=config.dropout_rate, mesh_axes=mesh_axes, rngs=rngs,
        )  # fmt: skip
    if config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads}: in routing attention every query "
            f"head has its keys, so leave it out, or set it to {config.num_heads}"
        )
    if config.dropout_rate:
        raise ValueError(
            f"dropout_rate={config.dropout_rate}: routing attention drops no "
            "weights, so leave it out"
        )
    return RoutingAttention(
        config.num_heads, config.d_model,
        routing=spec, dtype=config.dtype, transform_qk=rotary, rngs=rngs,
    )  # fmt: skip


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        config: ModelConfig,
        spec: Spec,
        rngs: nnx.Rngs,
        mesh_axes: sa.MeshAxes | None,
    ) -> None:
        norm = partial(nnx.RMSNorm, config.d_model, dtype=config.dtype, rngs=rngs)
        linear = partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.attention_norm = norm()
        self.attention = attention_layer(config, spec, rngs, mesh_axes)
        self.mlp_norm = norm()
        self.up = linear(config.d_model, config.d_hidden)
        # Blocks that add nothing at first leave the embedding readable.
        self.down = linear(config.d_hidden, config.d_model, kernel_init=ZEROS)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, seq, d_model]`` to the same shape."""
        return self.after(x + self.attention(self.attention_norm(x)))

    def decode(
        self, x: jax.Array, cache: sa.DecodingCache
    ) -> tuple[jax.Array, sa.DecodingCache]:
        """The same for new positions behind those of the cache."""
        found, cache = self.attention.decode(self.attention_norm(x), cache)
        return self.after(x + found), cache

    def after(self, x: jax.Array) -> jax.Array:
        """What follows the attention."""
        # Squared ReLU (So et al., Primer, 2021): cheap on a CPU, and learns fast.
        hidden = jnp.square(nnx.relu(self.up(self.mlp_norm(x))))
        return x + self.down(hidden)


class LanguageModel(nnx.Module):
    """The logits of the next byte at each position.

    ``mesh_axes`` are those of its attention layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: Spec,
        rngs: nnx.Rngs,
        mesh_axes: sa.MeshAxes | None = None,
    ) -> None:
        # Embeds a byte and the byte before it. So pairs of bytes, which a small model
        # takes long to find by attention, are known from the start.
        embed = partial(
            nnx.Embed, NUM_BYTES, config.d_model, dtype=config.dtype,
            embedding_init=nnx.initializers.normal(1.0), rngs=rngs,
        )  # fmt: skip
        self.embed, self.embed_before = embed(), embed()
        self.blocks = nnx.List(
            Block(config, spec, rngs, mesh_axes) for _ in range(config.num_layers)
        )
        self.norm = nnx.RMSNorm(config.d_model, dtype=config.dtype, rngs=rngs)
        # A head of zeros starts at exactly eight bits a byte. Its sums stay float32.
        self.head = nnx.Linear(
            config.d_model, NUM_BYTES, use_bias=False, dtype=config.dtype,
            preferred_element_type=jnp.float32, kernel_init=ZEROS, rngs=rngs,
        )  # fmt: skip

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps integers ``[batch, seq]`` to logits ``[batch, seq, 256]``, float32."""
        return self.logits(self.embedded(tokens))

    def embedded(self, tokens: jax.Array, last: jax.Array | None = None) -> jax.Array:
        """Maps integers ``[batch, seq]`` to the input of the first block.

        ``last`` is the byte before the first one, ``[batch]``; 0 if None.
        """
        first = jnp.zeros_like(tokens[:, 0]) if last is None else last
        before = jnp.concatenate([first[:, None], tokens[:, :-1]], axis=1)
        return self.embed(tokens) + self.embed_before(before)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, seq, d_model]`` to logits ``[batch, seq, 256]``, float32."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def init_caches(self, batch: int, max_len: int) -> tuple[sa.DecodingCache, ...]:
        """The empty caches of all blocks.

        Raises:
          NotImplementedError: routing layers have no cache.
        """
        layers = [block.attention for block in self.blocks]
        if not all(isinstance(layer, SparseAttention) for layer in layers):
            raise NotImplementedError(
                "routing attention has no cache: clusters are made of the whole "
                "sequence; continue a model of another spec"
            )
        return tuple(layer.init_cache(batch, max_len) for layer in layers)

    def decode(
        self, tokens: jax.Array, last: jax.Array, caches: tuple[sa.DecodingCache, ...]
    ) -> tuple[jax.Array, tuple[sa.DecodingCache, ...]]:
        """The logits of new tokens ``[batch, seq]`` behind those of the caches.

        ``last`` is the byte before the first of them, ``[batch]``.
        """
        x, after = self.embedded(tokens, last), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.decode(x, cache)
            after.append(cache)
        return self.head(self.norm(x)), tuple(after)


def bits_per_byte(
    model: LanguageModel,
    batch: jax.Array,
    spread: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
) -> jax.Array:
    """Mean cost of a byte given those before it; ``batch`` is ``[batch, seq + 1]``.

    ``spread`` lays tokens ``[batch, seq]`` out over devices.
    """
    tokens = batch.astype(jnp.int32)
    before, after = spread(tokens[:, :-1]), spread(tokens[:, 1:])
    losses = optax.softmax_cross_entropy_with_integer_labels(model(before), after)
    return losses.mean() * BITS_PER_NAT


def count_params(config: ModelConfig, spec: Spec) -> int:
    """Counts the parameters without making them."""
    model = nnx.eval_shape(lambda: LanguageModel(config, spec, nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(x.shape) for x in leaves)


def matched(config: ModelConfig, spec: Spec, num_params: int) -> ModelConfig:
    """Sizes with the MLP width that gives a model about ``num_params`` parameters.

    Each feature of an MLP has ``2 * d_model`` parameters in a layer.
    """
    feature = 2 * config.d_model * config.num_layers
    lacking = round((num_params - count_params(config, spec)) / feature)
    return replace(config, d_hidden=config.d_hidden + lacking)
