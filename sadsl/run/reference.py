"""The dense reference: attention computed over all pairs, in plain JAX.

Every other backend is tested against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.fits import INT32, exact, known_of, within
from lowering.run_time.vectors import look_up
from pallas_kernels.precision import wide


@dataclass(frozen=True)
class _Dense(NumPy):
    """Evaluates a predicate on positions ``[1, q, 1]`` and ``[1, 1, k]``.

    Operands have a batch axis in front. All integers have the dtype of the positions,
    int32 or int64.
    """

    xp: ClassVar[ModuleType] = jnp

    def operand(self, name: str, index: tuple) -> Any:
        return look_up(self.operands[name], index, rank=3).astype(self.q.dtype)

    def log2(self, x: Any) -> Any:
        bits = jnp.iinfo(self.q.dtype).bits - 1
        return sum((x >= 2**i).astype(self.q.dtype) for i in range(1, bits))

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        return jnp.asarray(values, self.q.dtype)[index]

    def isin(self, x: Any, values: tuple[int, ...]) -> Any:
        return jnp.isin(x, jnp.asarray(values, self.q.dtype))

    def constant(self, value: bool) -> Any:
        return jnp.full((1, 1, 1), value)


def pairs(
    nodes: tuple[ir.Pred, ...],
    q_seq_len: int,
    kv_seq_len: int,
    operands: Mapping[str, jax.Array],
) -> Bool[Array, "batch_or_1 heads q kv"]:
    """The pairs of every head, evaluated from one node for each head.

    The nodes are not simplified. Integers are int64 where int32 might overflow.
    """
    known = known_of(q_seq_len, kv_seq_len, len(nodes))
    nodes = tuple(exact(node, known) for node in nodes)
    if all(within(node, INT32, known) for node in nodes):
        return _pairs(nodes, (q_seq_len, kv_seq_len), operands, jnp.int32)
    with jax.enable_x64(True):
        return _pairs(nodes, (q_seq_len, kv_seq_len), operands, jnp.int64)


def _pairs(
    nodes: tuple[ir.Pred, ...],
    lengths: tuple[int, int],
    operands: Mapping[str, jax.Array],
    dtype: Any,
) -> Bool[Array, "batch_or_1 heads q kv"]:
    q = jnp.arange(lengths[0], dtype=dtype)[None, :, None]
    k = jnp.arange(lengths[1], dtype=dtype)[None, None, :]
    rows = [
        evaluate(node, _Dense(q, k, head, operands)) for head, node in enumerate(nodes)
    ]
    shape = jnp.broadcast_shapes(*(r.shape for r in rows), (1, *lengths))
    return jnp.stack([jnp.broadcast_to(r, shape) for r in rows], axis=1)


def attention(
    q: Float[Array, "batch q heads head_dim"],
    k: Float[Array, "batch kv kv_heads head_dim"],
    v: Float[Array, "batch kv kv_heads head_dim_v"],
    allowed: Bool[Array, "batch_or_1 heads q kv"],
    *,
    sm_scale: float,
    logits_soft_cap: float | None = None,
    bias: Float[Array, "_batch _heads _q _kv"] | None = None,
    factor: Float[Array, "batch heads q kv"] | None = None,
) -> tuple[Float[Array, "batch q heads head_dim_v"], Float[Array, "batch heads q"]]:
    """Output and natural lse over the allowed pairs, in f32 (f64 for f64 inputs).

    ``bias`` is added to the capped scores; a bias or a score of ``-inf`` leaves the
    pair out. A query that sees no key yields 0, -inf and zero gradients. Keys that no
    query sees, and queries that see no key, may hold NaN. ``factor`` multiplies the
    normalised weights, for dropout.
    """
    dtype = wide(q.dtype)
    group = q.shape[2] // k.shape[2]
    wide_q, wide_k, wide_v = (x.astype(dtype) for x in (q, k, v))
    wide_k, wide_v = (jnp.repeat(x, group, axis=2) for x in (wide_k, wide_v))
    if bias is not None:
        allowed = allowed & ~jnp.isneginf(bias)
    # A pair that is not allowed has weight 0, but 0 * NaN is NaN: replace such rows.
    seen, sees = (jnp.swapaxes(allowed.any(axis=a), 1, 2)[..., None] for a in (2, 3))
    wide_k, wide_v = (jnp.where(seen, x, 0) for x in (wide_k, wide_v))
    wide_q = jnp.where(sees, wide_q, 0)
    s = jnp.einsum("bqhd,bkhd->bhqk", wide_q, wide_k, precision="highest") * sm_scale
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    if bias is not None:
        # The -inf are in `allowed` already; adding them would make gradients NaN.
        s = s + jnp.where(jnp.isneginf(bias), 0, bias).astype(dtype)
    # Two wheres: neither forward nor backward may compute -inf minus -inf.
    allowed = allowed & ~jnp.isneginf(s)
    some = allowed.any(axis=-1, keepdims=True)
    least = jnp.finfo(dtype).min
    top = jnp.max(s, axis=-1, keepdims=True, where=allowed, initial=least)
    top = jax.lax.stop_gradient(top)
    p = jnp.where(allowed, jnp.exp(jnp.where(allowed, s - top, 0)), 0)
    l = jnp.where(some, p.sum(axis=-1, keepdims=True), 1)
    p = p / l if factor is None else p / l * factor.astype(dtype)
    o = jnp.einsum("bhqk,bkhd->bqhd", p, wide_v, precision="highest")
    lse = jnp.where(some, top + jnp.log(l), -jnp.inf)[..., 0]
    # This where also keeps the cotangents of queries without a key out of products.
    return jnp.where(sees, o, 0).astype(q.dtype), lse
