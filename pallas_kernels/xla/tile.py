"""The arithmetic of one row of blocks: its operands, allowed pairs and scores.

Axes are ``[batch, kv_heads, group, queries, ...]``. One matrix product per key head
covers all query heads of its group, so keys are never repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import bits, dropout, softmax
from pallas_kernels.call import Call, Inputs, PairBits, Seeds, Vectors
from pallas_kernels.precision import wide
from pallas_kernels.xla.added import Added, added
from pallas_kernels.xla.blocks import fold_heads as fold_heads
from pallas_kernels.xla.blocks import fold_if_own, from_blocks, to_blocks
from pallas_kernels.xla.heads import HeadGroup, pick
from pallas_kernels.xla.walk_types import XlaPlan


class Operands(NamedTuple):
    """The inputs of a head group, in blocks, with positions before heads.

    The public call has this layout too, so XLA cancels the two transposes. Only the
    blocks of the current row are transposed, in cache.
    """

    q: Float[Array, "batch q_blocks block_q q_heads head_dim"]
    k: Float[Array, "batch kv_blocks block_kv kv_heads head_dim"]
    v: Float[Array, "batch kv_blocks block_kv kv_heads head_dim_v"]


def operands(inputs: Inputs, heads: HeadGroup, plan: XlaPlan) -> Operands:
    """The inputs of a head group in blocks; no copy for one map and whole blocks."""
    q = positions_first(pick(inputs.q, heads.q_heads), plan.block_q)
    k, v = (positions_first(pick(x, heads.kv_heads), plan.block_kv) for x in inputs[1:])
    return Operands(q, k, v)


def positions_first(
    x: Float[Array, "b h n d"], size: int
) -> Float[Array, "b blocks {size} h d"]:
    """Splits positions into blocks, and moves the heads behind them."""
    return to_blocks(jnp.swapaxes(x, 1, 2), 1, size)


def heads_first(
    x: Float[Array, "b blocks size h d"], length: int
) -> Float[Array, "b h {length} d"]:
    """Undoes ``positions_first``."""
    return jnp.swapaxes(from_blocks(x, 1, length), 1, 2)


def queries_of(
    x: Float[Array, "b blocks q h d"], row: Array, kv_heads: int
) -> Float[Array, "b {kv_heads} gq d"]:
    """The block ``row`` of queries of every head, in f32, grouped by key head."""
    x = jax.lax.dynamic_index_in_dim(x, row, axis=1, keepdims=False)
    b, _, _, d = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(b, kv_heads, -1, d).astype(wide(x.dtype))


def put_queries(x: jax.Array, value: jax.Array, row: Array) -> jax.Array:
    """``x`` with ``value`` at the place that ``queries_of`` reads."""
    b, _, q, h, d = x.shape
    value = jnp.swapaxes(value.reshape(b, h, q, d).astype(x.dtype), 1, 2)
    return jax.lax.dynamic_update_index_in_dim(x, value, row, axis=1)


def row_of(x: Float[Array, "b h g blocks q *rest"], row: Array) -> Float[Array, "..."]:
    """The block ``row`` of every head, f32 ``[b, h, g * q, *rest]``."""
    x = jax.lax.dynamic_index_in_dim(x, row, axis=3, keepdims=False)
    b, h, g, q, *rest = x.shape
    return x.reshape(b, h, g * q, *rest).astype(wide(x.dtype))


def put_row(x: jax.Array, value: jax.Array, row: Array) -> jax.Array:
    """``x`` with ``value`` at the place that ``row_of`` reads."""
    b, h, g, _, q, *rest = x.shape
    value = value.reshape(b, h, g, q, *rest).astype(x.dtype)
    return jax.lax.dynamic_update_index_in_dim(x, value, row, axis=3)


class Shown(NamedTuple):
    """The allowed pairs of a row of blocks, and the values added to their scores.

    ``limit`` and ``added`` have the axes of a tile of scores, each of size 1 if shared.
    ``limit`` is ``inf`` for an allowed pair and ``-inf`` for any other. ``seen`` marks
    the keys that some query sees, ``[batch or 1, kv_heads or 1, k]``; None means all.
    ``added`` has natural units. ``padding`` says that only copies of other pairs of
    the tile are not allowed.
    """

    limit: Float[Array, "..."]
    seen: Bool[Array, "..."] | None = None
    added: Float[Array, "..."] | None = None
    padding: bool = False


def shown(allowed: Bool[Array, "..."], *, padding: bool = False) -> Shown:
    """The ``Shown`` of a bool tile of pairs, with nothing added to the scores.

    With ``padding``, only copies of other pairs of the tile are not allowed.
    """
    limit = jnp.where(allowed, jnp.float32(jnp.inf), jnp.float32(-jnp.inf))
    seen = None if padding else allowed.any(axis=(2, 3))
    return Shown(limit, seen, padding=padding)


def masked(s: Float[Array, "b h g q k"], of: Shown) -> Float[Array, "b h g q k"]:
    """Capped scores with the added values, and ``-inf`` where a pair is not allowed.

    Comparing floats takes one instruction, as a minimum does; selecting by a bool takes
    one pass more. Unlike a minimum, it replaces a NaN of a pair that is not allowed.
    """
    s = s if of.added is None else s + of.added
    limit = of.limit.astype(s.dtype)
    return jnp.where(s < limit, s, limit)


def gather(
    x: Float[Array, "b blocks k h d"],
    block: Int32[Array, " slots"],
    seen: Bool[Array, "..."] | None = None,
) -> Float[Array, "b h slots_k d"]:
    """The keys or values of some blocks, side by side, 0 for those not ``seen``.

    16-bit operands are widened, since CPUs multiply f32 faster.
    """
    b, _, _, h, d = x.shape
    # Every index is valid; checking the bounds would cost one pass over the tile.
    tiles = jnp.take(x, block, axis=1, mode="clip").reshape(b, -1, h, d)
    tiles = jnp.swapaxes(tiles, 1, 2).astype(wide(x.dtype))
    return tiles if seen is None else jnp.where(seen[..., None], tiles, 0.0)


def batched_dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """``softmax.dot`` for each batch entry and key head."""
    return jax.vmap(jax.vmap(partial(softmax.dot, contract=contract)))(a, b)


def scores(
    q: Float[Array, "b h gq d"], k: Float[Array, "b h k d"], group: int, call: Call
) -> Float[Array, "b h {group} q k"]:
    """Capped scores of an already scaled ``q``, without a mask."""
    s = batched_dot(q, k, contract=(1, 1))
    s = softmax.cap(s, call.logits_soft_cap, call.unit)
    return s.reshape(*s.shape[:2], group, -1, s.shape[-1])


def for_all(
    x: Float[Array, "..."], group: int, shape: tuple[int, ...]
) -> Float[Array, "b h gq k"]:
    """Broadcasts ``[b or 1, h or 1, group or 1, q, k]`` to ``shape``."""
    b, h, gq, k = shape
    return jnp.broadcast_to(x, (b, h, group, gq // group, k)).reshape(shape)


def real_keys(
    count: Int32[Array, ""], slots: int, block_kv: int
) -> Bool[Array, "1 1 1 1 k"]:
    """Marks the keys of the first ``count`` of ``slots`` blocks; others are padding."""
    real = jnp.arange(slots, dtype=jnp.int32) < count
    return jnp.repeat(real, block_kv)[None, None, None, None]


@dataclass(frozen=True)
class Pairs:
    """Computes allowed pairs, added scores and dropout factors of a head group."""

    call: Call
    test: Any
    vectors: Vectors  # each [batch or 1, kv_heads or 1, group or 1, blocks, block]
    block_q: int
    block_kv: int
    q_seq_len: int
    kv_seq_len: int
    scores: Added | None = None

    def with_scores(
        self,
        tile: Shown,
        row: Int32[Array, ""],
        block: Int32[Array, " slots"],
    ) -> Shown:
        """``tile`` with the values added to the scores; ``-inf`` removes a pair."""
        if self.scores is None:
            return tile
        pieces = self.scores.pieces(row, block)
        added = self.scores.tile(pieces, row, block)
        if not self.scores.has_arrays:
            return tile._replace(added=added)
        limit = jnp.where(jnp.isneginf(added), -jnp.inf, tile.limit)
        if self.q_seq_len % self.block_q:
            limit = jnp.where(self.real_queries(row), limit, -jnp.inf)
        return Shown(limit, (limit > 0).any(axis=(2, 3)), added)

    def factor(
        self, row: Int32[Array, ""], block: Int32[Array, " slots"], dtype: Any
    ) -> Float[Array, "..."] | None:
        """The dropout factor of the weights, shaped like the bias; None without it."""
        if not self.call.dropout_rate:
            return None
        assert self.vectors.seeds is not None
        queries, keys = self.vectors.seeds
        queries = jax.lax.dynamic_index_in_dim(queries, row, 3, keepdims=False)
        keys = jnp.take(keys, block, axis=3, mode="clip")
        keys = keys.reshape(*keys.shape[:3], 1, -1)
        return dropout.factor(queries[..., None], keys, self.call.dropout_rate, dtype)

    def real(
        self, row: Int32[Array, ""], block: Int32[Array, " slots"], count: Array
    ) -> Bool[Array, "..."]:
        """The allowed pairs of the first ``count`` of some partial blocks."""
        return self.allowed(row, block) & real_keys(count, len(block), self.block_kv)

    def allowed(
        self, row: Int32[Array, ""], block: Int32[Array, " slots"]
    ) -> Bool[Array, "..."]:
        """The predicate on a row of blocks, evaluated once for heads that share it.

        The result is ``[batch or 1, kv_heads or 1, group or 1, q, slots * k]``.
        """
        along_q = jnp.arange(self.block_q, dtype=jnp.int32)
        along_kv = jnp.arange(self.block_kv, dtype=jnp.int32)
        q_ids = (row * self.block_q + along_q)[:, None]
        k_ids = (block[:, None] * self.block_kv + along_kv[None]).reshape(1, -1)
        test = jnp.asarray(self.test, jnp.int32)

        def pairs(q_vectors: tuple, kv_vectors: tuple, held: tuple) -> jax.Array:
            return self.call.predicate(test, q_ids, k_ids, q_vectors, kv_vectors, held)

        def along(x: jax.Array) -> jax.Array:
            tiles = jnp.take(x, block, axis=3, mode="clip")
            return tiles.reshape(*tiles.shape[:3], 1, -1)

        q_vectors = tuple(
            jax.lax.dynamic_index_in_dim(x, row, 3, keepdims=False)[..., None]
            for x in self.vectors.q
        )
        kv_vectors = tuple(along(x) for x in self.vectors.kv)
        held = tuple(self.bits(x, row, block) for x in self.vectors.bits)
        allowed = mapped(pairs, 3)(q_vectors, kv_vectors, held)
        if self.kv_seq_len % self.block_kv:
            allowed &= (k_ids < self.kv_seq_len)[None, None, None]
        if self.q_seq_len % self.block_q:
            # A key that only padded queries see counts as not seen.
            allowed &= self.real_queries(row)
        return allowed

    def real_queries(self, row: Int32[Array, ""]) -> Bool[Array, "1 1 1 q 1"]:
        """Marks the queries of a row that are not padding."""
        along = jnp.arange(self.block_q, dtype=jnp.int32)
        return (row * self.block_q + along < self.q_seq_len)[None, None, None, :, None]

    def bits(
        self, x: PairBits, row: Int32[Array, ""], block: Int32[Array, " slots"]
    ) -> Bool[Array, "..."]:
        """The bits of a row of blocks, ``[batch or 1, heads, group, q, slots * k]``."""
        count = bits.words_of_block(x, self.block_q)
        sizes = (*x.words.shape[:3], 1, x.words.shape[4], count)

        def words_of(at: Int32[Array, ""]) -> Int32[Array, "..."]:
            plane, start = bits.window(
                x, row, at, block_q=self.block_q, kv_seq_len=self.kv_seq_len
            )
            zero = jnp.int32(0)
            first = (zero, zero, zero, plane, zero, start)
            first = tuple(jnp.asarray(i, jnp.int32) for i in first)
            return jax.lax.dynamic_slice(x.words, first, sizes)[:, :, :, 0]

        # [batch, heads, group, words, q, slots]
        words = jnp.moveaxis(jax.vmap(words_of)(block), 0, -1)
        columns = [words[:, :, :, i, :, :, None] for i in range(words.shape[3])]
        keys = jnp.take(x.bit, block, axis=0, mode="clip")[None, None, None, None]
        held = bits.tile(columns, keys)
        held = held.reshape(*held.shape[:4], -1)
        return jnp.repeat(held, self.block_q // count, axis=3)


def mapped(f: Callable, axes: int) -> Callable:
    """``f`` mapped over ``axes`` leading axes, each of which may have size 1.

    An axis that has size 1 in all arguments keeps size 1 and is evaluated once. So the
    predicate sees vectors of the rank of its ids, as on the other backends.
    """
    if not axes:
        return f

    def over(*args: tuple) -> jax.Array:
        inner = mapped(f, axes - 1)
        leaves, tree = jax.tree.flatten(args)
        many = [x.shape[0] > 1 for x in leaves]
        one = [x if m else x[0] for x, m in zip(leaves, many, strict=True)]
        if not any(many):
            return inner(*tree.unflatten(one))[None]
        in_axes = tree.unflatten([0 if m else None for m in many])
        return jax.vmap(inner, in_axes=in_axes)(*tree.unflatten(one))

    return over


def pairs_of(
    call: Call,
    vectors: Vectors,
    heads: HeadGroup,
    plan: XlaPlan,
    lengths: tuple[int, int],
) -> Pairs:
    """The ``Pairs`` of a head group, with its vectors in blocks."""

    def split(x: jax.Array, size: int) -> jax.Array:
        return to_blocks(fold_if_own(x, heads), 3, size)

    def whole(x: PairBits) -> PairBits:
        words = fold_if_own(x.words, heads)
        length = bits.padded_length(x, plan.block_q, *lengths)
        short = length - words.shape[-1]
        words = jnp.pad(words, [(0, 0)] * 5 + [(0, short)])
        return replace(x, words=words, bit=to_blocks(x.bit, 0, plan.block_kv))

    bits.check(vectors.bits, (plan.block_q, plan.block_kv))
    seeds = vectors.seeds
    if seeds is not None:
        seeds = Seeds(split(seeds.q, plan.block_q), split(seeds.kv, plan.block_kv))
    blocked = Vectors(
        tuple(split(x, plan.block_q) for x in vectors.q),
        tuple(split(x, plan.block_kv) for x in vectors.kv),
        tuple(whole(x) for x in vectors.bits),
        seeds=seeds,
    )
    sizes = plan.block_q, plan.block_kv
    own = None
    if call.scores is not None:
        own = added(call.scores, vectors.scores, heads, lengths, sizes)
    return Pairs(call, heads.test, blocked, *sizes, *lengths, own)
