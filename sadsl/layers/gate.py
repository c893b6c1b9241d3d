"""SeerAttention's gate as a layer of Flax NNX, and the loss that trains it.

Gao et al., SeerAttention: learning intrinsic sparse attention in your LLMs, 2024,
section 3. The gate scores blocks from pooled queries and keys; its scores are the
operand of ``sadsl.catalog.seer_attention``. Nothing but the gate is trained.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sadsl.maps.named import causal
from sadsl.run import checks
from sadsl.run.call import attention
from sadsl.run.cell_mass import cell_mass
from sadsl.selections.cell_scores import products
from sadsl.selections.tiles import pooled

HEAD_INIT = nnx.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=0
)


class BlockGate(nnx.Module):
    """Predicts how much each block of queries attends to each block of keys.

    Queries are pooled by their mean, keys by maximum, minimum and mean, side by side. A
    linear map for each head takes them to ``gate_dim`` numbers, which are rotated to
    the position where their block begins. ``gate(q, k)`` is the softmax over the blocks
    up to the own one.

    Gao et al., SeerAttention, 2024, section 3.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.gate import BlockGate
      >>> def scores(q, k):
      ...     gate = BlockGate(2, 8, block=4, gate_dim=6, rngs=nnx.Rngs(0))
      ...     return gate(q, k)
      >>> q = jax.ShapeDtypeStruct((1, 10, 2, 8), "float32")  # [batch, seq, heads, dim]
      >>> jax.eval_shape(scores, q, q).shape  # [batch, heads, q_blocks, kv_blocks]
      (1, 2, 3, 3)
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        block: int = 64,
        gate_dim: int = 128,
        rope_theta: float = 10_000.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters: one linear map for each query head and each key head.

        Args:
          num_heads, num_kv_heads: heads of the queries and of the keys (as many if
            None). The heads of the keys must divide those of the queries.
          head_dim: features of a query or key.
          block: positions of a block; that of the spec.
          gate_dim: width of the gate, even.
          rope_theta: the base of the rotary positions.
          param_dtype: of the parameters; the gate computes in float32.
          rngs: where ``rngs.params`` comes from.

        Raises:
          ValueError: the sizes are too small or do not divide.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "block": block}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a multiple of "
                f"num_kv_heads={num_kv_heads}"
            )
        if gate_dim < 2 or gate_dim % 2:
            raise ValueError(
                f"gate_dim={gate_dim} must be even: it is rotated in pairs"
            )
        self.block, self.rope_theta = block, rope_theta
        shapes = (num_heads, head_dim, gate_dim), (num_kv_heads, 3 * head_dim, gate_dim)
        query, key = (HEAD_INIT(rngs.params(), shape, param_dtype) for shape in shapes)
        self.query, self.key = nnx.Param(query), nnx.Param(key)

    def logits(
        self,
        q: Float[Array, "batch q num_heads head_dim"],
        k: Float[Array, "batch kv num_kv_heads head_dim"],
    ) -> Float[Array, "batch num_heads q_blocks kv_blocks"]:
        """The scores before the softmax, -inf for later blocks.

        Args:
          q, k: what attention takes, before rotary positions.

        Raises:
          ValueError: q or k does not have the heads and the width of the gate.
        """
        weights = {"q": self.query[...], "k": self.key[...]}
        found = {"q": q, "k": k}
        for name, x in found.items():
            parts = 3 if name == "k" else 1
            heads, width = weights[name].shape[0], weights[name].shape[1] // parts
            if x.ndim != 4 or x.shape[2:] != (heads, width):
                raise ValueError(
                    f"{name} has shape {x.shape}: the gate was made for [batch, seq, "
                    f"{heads}, {width}]"
                )
        means = _pooled(q, self.block, ("mean",))
        keys = _pooled(k, self.block, ("max", "min", "mean"))
        wide_q = self._rotated(means, weights["q"])
        wide_k = self._rotated(keys, weights["k"])
        scores = products(wide_q, wide_k) * checks.scale(None, wide_q.shape[-1])
        rows, columns = (np.arange(n) for n in scores.shape[2:])
        past = (columns[None, :] <= rows[:, None])[None, None]
        return jnp.where(past, scores, -jnp.inf)

    def __call__(
        self,
        q: Float[Array, "batch q num_heads head_dim"],
        k: Float[Array, "batch kv num_kv_heads head_dim"],
    ) -> Float[Array, "batch num_heads q_blocks kv_blocks"]:
        """The probabilities: pass them as ``operands={"gate": gate(q, k)}``."""
        return jax.nn.softmax(self.logits(q, k), axis=-1)

    def _rotated(
        self,
        x: Float[Array, "batch heads blocks pools"],
        weight: Float[Array, "heads pools gate"],
    ) -> Float[Array, "batch heads blocks gate"]:
        x = jnp.einsum("bhnp,hpg->bhng", x, weight.astype(jnp.float32))
        half = x.shape[-1] // 2
        frequency = self.rope_theta ** -(np.arange(half) / half)
        angle = np.arange(x.shape[2])[:, None] * self.block * frequency
        cos, sin = (
            jnp.asarray(f(angle), jnp.float32)[None, None] for f in (np.cos, np.sin)
        )
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _pooled(
    x: Float[Array, "batch seq heads dim"], block: int, ways: tuple[str, ...]
) -> Float[Array, "batch heads blocks pools"]:
    x = jnp.swapaxes(x, 1, 2)
    return jnp.concatenate([pooled(x, block, how) for how in ways], axis=-1)


def target(
    q: Float[Array, "batch seq num_heads head_dim"],
    k: Float[Array, "batch seq num_kv_heads head_dim"],
    lse: Float[Array, "batch num_heads seq"] | None = None,
    *,
    block: int = 64,
    sm_scale: float | None = None,
) -> Float[Array, "batch num_heads blocks blocks"]:
    """The scores that the gate should learn: the largest weight in each block.

    Each row is scaled to add up to 1. Attention is causal. A block is computed by
    itself, from the lse, so the matrix of all pairs never exists. No gradient flows
    through the target.

    Args:
      q, k: those of the attention, with their positions.
      lse: of the attention, which ``return_lse=True`` returns; computed if None.
      block: positions of a block; that of the gate.
      sm_scale: as in ``sadsl.attention``; ``head_dim ** -0.5`` if None.

    Raises:
      ValueError: the shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.layers.gate import target
      >>> target(*jnp.zeros((2, 1, 4, 1, 8)), block=2)[0, 0].tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    if lse is None:
        q, k = jax.lax.stop_gradient((q, k))
        one = k[..., :1]
        _, lse = attention(q, k, one, causal(), sm_scale=sm_scale, return_lse=True)
    found = cell_mass(q, k, lse, causal(), block=block, sm_scale=sm_scale)
    return found / jnp.sum(found, axis=-1, keepdims=True)


def distillation_loss(
    logits: Float[Array, "batch heads blocks blocks"],
    wanted: Float[Array, "batch heads blocks blocks"],
    *,
    skip: float = 0.25,
    weight: float = 10.0,
) -> Float[Array, ""]:
    """The divergence of the gate from its target, ``KL(wanted | softmax(logits))``.

    It is averaged over all entries, as in the code, and multiplied by ``weight``. The
    first ``skip`` of the rows of blocks do not count: they have little to choose from.

    Args:
      logits: ``BlockGate.logits``, -inf for later blocks.
      wanted: ``target``.
      skip: the share of the rows that is left out, from 0 to below 1.
      weight: the factor of the loss.

    Raises:
      ValueError: the two differ in shape, or ``skip`` leaves no row.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from sadsl.layers.gate import distillation_loss
      >>> wanted = np.array([[[[1.0, 0.0], [0.5, 0.5]]]], np.float32)
      >>> logits = np.array([[[[3.0, -np.inf], [2.0, 2.0]]]], np.float32)
      >>> float(jax.jit(distillation_loss)(logits, wanted))
      0.0
    """
    if logits.shape != wanted.shape:
        raise ValueError(
            f"logits have shape {logits.shape} and wanted {wanted.shape}: both must be "
            "[batch, heads, blocks, blocks], of one block size"
        )
    if not 0 <= skip < 1:
        raise ValueError(f"skip={skip} must be at least 0 and below 1")
    first = int(logits.shape[2] * skip)
    logits, wanted = logits[:, :, first:], wanted[:, :, first:]
    some = wanted > 0
    # Both logarithms are replaced where wanted is 0: later blocks have -inf in each,
    # and -inf - -inf would be NaN.
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_p = jnp.where(some, log_p, 0.0)
    log_wanted = jnp.log(jnp.where(some, wanted, 1.0))
    return weight * jnp.mean(wanted * (log_wanted - log_p))
