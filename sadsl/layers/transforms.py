"""What a layer does to its heads around the attention, for both Flax APIs.

A ``HeadTransforms`` is a frozen value: rotary positions, norms, shared keys and
values, and an output gate. It lists the arrays that it learns, and its methods are pure
functions of them. ``SparseAttention`` of NNX and of Linen hold the arrays.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.precision import widened
from sadsl.layers.linear_gates import Parameter
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary, document_positions
from sadsl.terms.base import LayerSizes, Term
from sadsl.terms.softmax import Softmax

# Arrays by group and name; the groups of norms are named as Flax names them.
Groups: TypeAlias = Mapping[str, Mapping[str, Array]]
QueryKeyFunction: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]

PROJECTIONS = ("query", "key", "value", "out")
NORMS = {"query_ln": "num_q_heads", "key_ln": "num_kv_heads"}


@dataclass(frozen=True)
class QKNorm(RowNorm):
    """A norm of queries and of keys; each has its own weight.

    The other attributes are those of ``RowNorm``.

    Attributes:
      over: the norm is over the channels of one head, which all heads share, or over
        those of all heads together (OLMo 2, 2024).
      after_rotary: whether it follows the rotation (Llama 4, 2025).

    Example:
      >>> QKNorm(plus_one=True).parameters("scale", 8)["scale"].shape
      (8,)
    """

    over: Literal["head", "heads"] = "head"
    after_rotary: bool = False

    def of_heads(
        self, params: Mapping[str, Array], x: Float[Array, "batch seq heads dim"]
    ) -> Float[Array, "batch seq heads dim"]:
        """The norm of projected queries or keys."""
        rows = x.reshape(*x.shape[:2], -1) if self.over == "heads" else x
        return self("scale", params, rows).reshape(x.shape)


@dataclass(frozen=True)
class OutputGate:
    """Multiplies the output of the heads by a function of a projection of ``x``.

    Attributes:
      by: one number for each channel of each head, or for each head.
      squash: the function.
    """

    by: Literal["channel", "head"] = "channel"
    squash: Literal["sigmoid", "softplus"] = "sigmoid"

    def __call__(
        self,
        out: Float[Array, "batch seq heads dim"],
        logits: Float[Array, "batch seq heads *dim"],
    ) -> Float[Array, "batch seq heads dim"]:
        """The gated output, in the dtype of ``out``."""
        squash = jax.nn.sigmoid if self.squash == "sigmoid" else jax.nn.softplus
        gate = squash(widened(logits))
        if self.by == "head":
            gate = gate[..., None]
        return (widened(out) * gate).astype(out.dtype)


class TokenPositions(NamedTuple):
    """The positions of queries and keys, ``[seq]`` or ``[batch or 1, seq]``."""

    q: Array
    kv: Array


@dataclass(frozen=True)
class HeadTransforms:
    """What a layer does to queries, keys, values and outputs around the attention.

    Keys and queries are normalised, then rotated, then given to ``transform_qk``.

    Attributes:
      rotary: of queries and keys; None for none (NoPE).
      qk_norm: of queries and keys.
      value_norm: of each value, over the channels of its head (Gemma 4, 2026).
      scale: the factor of the scores; ``head_dim ** -0.5`` if None.
      share_kv: whether one projection makes keys and values. "projected": values are
        keys before their norm and rotation (Gemma 4). "final": values are keys after
        them, and the output is turned back by the query's angle (DeepSeek-V4, 2026).
        Where keys and values are equal, ``softmax(values=...)`` loads them once.
      gate: of the output, before the output projection.

    Raises:
      ValueError: a norm of values that are the final keys.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import SparseAttention
      >>> from sadsl.layers.rotary import Rotary
      >>> qwen3_next = HeadTransforms(
      ...     Rotary(2), QKNorm(plus_one=True), gate=OutputGate())
      >>> def model(x):
      ...     layer = SparseAttention(
      ...         "causal()", 2, 8, transforms=qwen3_next, rngs=nnx.Rngs(0))
      ...     return layer(x)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")
      >>> jax.eval_shape(model, x).shape
      (1, 6, 8)
    """

    rotary: Rotary | None = None
    qk_norm: QKNorm | None = None
    value_norm: RowNorm | None = None
    scale: float | None = None
    share_kv: Literal["projected", "final"] | None = None
    gate: OutputGate | None = None

    def __post_init__(self) -> None:
        if self.share_kv == "final" and self.value_norm is not None:
            raise ValueError(
                f"HeadTransforms: value_norm={self.value_norm!r} with "
                "share_kv='final', whose values are the finished keys: leave "
                "value_norm=None, or share_kv='projected'"
            )

    def check(self, sizes: LayerSizes) -> None:
        """Raises a ValueError if more channels turn than a head has."""
        dim = sizes.head_dim
        if self.rotary is not None and self.rotary.channels > dim:
            raise ValueError(
                f"transforms: {self.rotary.channels} channels turn, but "
                f"head_dim={dim}: turn fewer, or make heads wider"
            )

    def parameters(self, sizes: LayerSizes) -> dict[str, dict[str, Parameter]]:
        """The arrays that the layer learns beside its projections, by group."""
        found: dict[str, dict[str, Parameter]] = {}
        norm, dim = self.qk_norm, sizes.head_dim
        if norm is not None:
            for group, heads in NORMS.items():
                width = dim * getattr(sizes, heads) if norm.over == "heads" else dim
                found[group] = norm.parameters("scale", width)
        if self.value_norm is not None:
            found["value_ln"] = self.value_norm.parameters("scale", dim)
        if self.rotary is not None:
            found["rotary"] = self.rotary.parameters()
        return {group: arrays for group, arrays in found.items() if arrays}

    def gate_axes(self, sizes: LayerSizes) -> tuple[int, ...]:
        """The axes of the gate of a token; none without a gate."""
        if self.gate is None:
            return ()
        axes = sizes.num_q_heads, sizes.head_dim
        return axes if self.gate.by == "channel" else axes[:1]

    def term(self, term: Term, head_dim: int, other: QueryKeyFunction | None) -> Term:
        """The term to run: with ``values=`` where values equal keys."""
        keys_change = any((self.rotary, self.qk_norm, self.value_norm, other))
        equal = self.share_kv == "final" or (self.share_kv and not keys_change)
        if equal and isinstance(term, Softmax) and term.values is None:
            return replace(term, values=(0, head_dim))
        return term

    def before(
        self,
        params: Groups,
        qkv: tuple[Array, Array, Array | None],
        at: TokenPositions,
        other: QueryKeyFunction | None = None,
    ) -> tuple[Array, Array, Array]:
        """The arrays of the call, from what the layer projects.

        Args:
          params: an array for each of ``parameters``.
          qkv: projected queries, keys and values; None for values that are keys.
          at: the positions.
          other: a further function of queries and keys.
        """
        q, k, v = qkv
        v = k if v is None else v
        if self.value_norm is not None:
            v = self.value_norm("scale", params.get("value_ln", {}), v)
        late = self.qk_norm is not None and self.qk_norm.after_rotary
        q, k = (q, k) if late else self._normalised(params, q, k)
        if self.rotary is not None:
            learned = params.get("rotary", {})
            q, k = self.rotary(q, at.q, learned), self.rotary(k, at.kv, learned)
        q, k = self._normalised(params, q, k) if late else (q, k)
        if other is not None:
            q, k = other(q, k)
        return q, k, k if self.share_kv == "final" else v

    def after(
        self, params: Groups, out: Array, logits: Array | None, at: TokenPositions
    ) -> Float[Array, "batch seq heads dim"]:
        """What the output projection reads; ``logits`` are those of the gate."""
        if self.share_kv == "final" and self.rotary is not None:
            out = self.rotary(out, at.q, params.get("rotary", {}), back=True)
        if self.gate is not None:
            assert logits is not None
            out = self.gate(out, logits)
        return out

    def _normalised(self, params: Groups, q: Array, k: Array) -> tuple[Array, Array]:
        norm = self.qk_norm
        if norm is None:
            return q, k
        groups = (params.get(group, {}) for group in NORMS)
        q, k = (norm.of_heads(p, x) for p, x in zip(groups, (q, k), strict=True))
        return q, k


# One for all layers, or one for each.
Transforms: TypeAlias = HeadTransforms | Sequence[HeadTransforms] | None


def token_positions(
    shapes: tuple[Sequence[int], Sequence[int] | None],
    positions: Integer[Array, "..."] | None,
    kv_positions: Integer[Array, "..."] | None,
    ids: tuple[Any, Any] = (None, None),
) -> TokenPositions:
    """The positions of queries and keys.

    Without ``positions`` they count from 0, and restart where a segment id changes.

    Args:
      shapes: of the inputs of queries and of keys; None for keys of the same input,
        which are at the positions of the queries.
      positions, kv_positions: integers ``[seq]`` or ``[batch or 1, seq]``.
      ids: segment ids of queries and of keys.

    Raises:
      ValueError: positions have another shape, or are no integers.
    """
    q = _given("positions", positions, shapes[0], ids[0])
    if shapes[1] is None and kv_positions is None:
        return TokenPositions(q, q)
    return TokenPositions(
        q, _given("kv_positions", kv_positions, shapes[1] or shapes[0], ids[1])
    )


def _given(name: str, positions: Any, shape: Sequence[int], ids: Any) -> Array:
    batch, seq = shape[:2]
    if positions is None:
        counted = jnp.arange(seq, dtype=jnp.int32)
        return counted if ids is None else document_positions(ids)
    positions = jnp.asarray(positions)
    if positions.shape not in ((seq,), (1, seq), (batch, seq)):
        raise ValueError(
            f"{name} has shape {positions.shape}: it must be ({seq},), or "
            f"({batch}, {seq}), a position for each token"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {positions.dtype}: positions are integers")
    return positions


def with_bias(
    use_bias: bool | Collection[str], transforms: HeadTransforms
) -> frozenset[str]:
    """The projections that have a bias.

    Raises:
      ValueError: the layer has no projection of a name.
    """
    if isinstance(use_bias, bool):
        return frozenset(PROJECTIONS if use_bias else ())
    known = [name for name in PROJECTIONS if name != "value" or not transforms.share_kv]
    known += [] if transforms.gate is None else ["gate"]
    names = (use_bias,) if isinstance(use_bias, str) else use_bias
    for name in names:
        if name not in known:
            raise ValueError(
                f"use_bias names {name!r}, which is no projection of this layer: it "
                f"has {', '.join(known)}"
            )
    return frozenset(names)
