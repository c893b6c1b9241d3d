"""Arrays in the shapes that the TPU kernels read: flat heads, padded sequences."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dropout
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, Inputs, PairBits, Vectors
from pallas_kernels.tpu import bit_tiles, bit_words
from pallas_kernels.tpu.runs import LANES, TpuSizes
from pallas_kernels.tpu.walk import BlockOperand, HeadOf, TileOperand


class SideOperands(NamedTuple):
    """The arrays of the queries or of the keys of a block, beside ``q, k, v``.

    Each entry is a ``BlockOperand`` in a launch, a ref ``[1, block]`` in a kernel, and
    then a value ``[1, block]`` (``values_of``) or ``[block, 1]`` (``columns_of``).
    """

    vectors: tuple  # int32, for the predicate
    seeds: Any  # int32, for dropout; None without
    bits: tuple  # int32, of keys: ``bit_tiles.key_numbers`` of each of ``Vectors.bits``
    scores: tuple  # f32, for ``Call.scores``


class PairOperands(NamedTuple):
    """The arrays of the pairs of a tile: ``TileOperand``, and refs in a kernel."""

    words: tuple  # int32 windows of each of ``Vectors.bits``: ``bit_words.placed``
    scores: tuple  # f32 windows of each of ``ScoreValues.pairs``


def side_operands(
    vectors: Vectors,
    side: Axis,
    block: int,
    batch_and_heads: tuple[int, int],
    members: int,
    *,
    by: Axis,
) -> SideOperands:
    """The operands of the queries or of the keys, in blocks of ``block``.

    The kernel has rows ``by`` "q" or "kv".
    """
    seeds, scores = vectors.seeds, vectors.scores
    if side == "q":
        own = None if seeds is None else seeds.q
        found = SideOperands(vectors.q, own, (), scores.q)
    else:
        own = None if seeds is None else seeds.kv
        bits = tuple(bit_tiles.key_numbers(x, by) for x in vectors.bits)
        found = SideOperands(vectors.kv, own, bits, scores.kv)
    return jax.tree.map(
        lambda x: vector_operand(x, block, batch_and_heads, members), found
    )


def values_of(refs: SideOperands) -> SideOperands:
    """The values of a block as rows, ``[1, block]``."""
    return jax.tree.map(lambda ref: ref[...], refs)


def columns_of(refs: SideOperands) -> SideOperands:
    """The values of a block as columns ``[block, LANES]``, the same in all lanes.

    They are made once for all tiles of a row: to spread a value over the lanes costs as
    much as to compare it.
    """

    def column(ref: Any) -> jax.Array:
        row = ref[...]
        return jnp.broadcast_to(row, (LANES, row.shape[1])).T

    return jax.tree.map(column, refs)


def across(columns: SideOperands, width: int) -> SideOperands:
    """The values of ``columns_of`` over a tile of ``width`` lanes.

    A tile of whole registers repeats them, which moves nothing.
    """
    if width % LANES:
        return jax.tree.map(lambda x: x[:, :1], columns)
    return jax.tree.map(
        lambda x: jnp.concatenate([x] * (width // LANES), axis=1), columns
    )


def prepared(inputs: Inputs) -> Inputs:
    """``q, k, v`` in a dtype that the kernels can multiply."""
    # The chip has no f16 arithmetic, and bf16 has three bits less.
    half = inputs.q.dtype == jnp.float16
    return Inputs(*(x.astype(jnp.float32) if half else x for x in inputs))


def padded(x: jax.Array, block: int, axis: int) -> jax.Array:
    """``x`` with zeros up to a multiple of ``block`` along ``axis``."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, width)


def flat(x: jax.Array, block: int) -> jax.Array:
    """``[batch, heads, seq, dim]`` as ``[batch * heads, padded seq, dim]``."""
    x = padded(x, block, 2)
    return x.reshape(-1, *x.shape[2:])


def value_operand(
    v: jax.Array, block: int, head_of: HeadOf, call: Call
) -> BlockOperand | None:
    """The operand of the values; None if they are channels of the keys."""
    return None if call.values else BlockOperand(flat(v, block), head_of)


def tile_values(k: Any, v_ref: Any, call: Call) -> jax.Array:
    """The values of a block, whose keys are ``k``, an array or a ref."""
    return k[:, slice(*call.values)] if call.values else v_ref[...]


def vector_operand(
    x: jax.Array, block: int, batch_and_heads: tuple[int, int], members: int
) -> BlockOperand:
    """A vector ``[batch or 1, heads or 1, seq]`` as an operand of rows ``[1, seq]``."""
    own_batch, own_heads, _ = x.shape
    head_of = head_of_array((own_batch, own_heads), batch_and_heads, members)
    x = padded(x, block, 2)
    return BlockOperand(x.reshape(own_batch * own_heads, 1, -1), head_of, axis=2)


def head_of_array(
    own: tuple[int, int], batch_and_heads: tuple[int, int], members: int
) -> HeadOf:
    """The function ``head_of(head, member)`` of an array with flat heads.

    ``own`` are its numbers of batch entries and heads, each of which may be 1;
    ``batch_and_heads`` are those of the queries.
    """
    own_batch, own_heads = own
    batch, num_heads = batch_and_heads

    def head_of(head: Any, member: Any) -> Any:
        query_head = head * members + member
        if own_batch == batch and own_heads == num_heads:
            return query_head
        if own_batch == batch and batch > 1:
            return lax.div(query_head, jnp.int32(num_heads))
        if own_heads == num_heads and num_heads > 1:
            return lax.rem(query_head, jnp.int32(num_heads))
        return jnp.int32(0)

    return head_of


def with_batch_and_heads(vectors: Vectors) -> Vectors:
    """``vectors`` with bit numbers ``[1, 1, kv]``: every array then has both axes."""
    bits = tuple(
        replace(x, bit=jnp.asarray(x.bit, jnp.int32)[None, None]) for x in vectors.bits
    )
    return vectors._replace(bits=bits)


def word_operand(
    x: PairBits,
    sizes: TpuSizes,
    batch_and_heads: tuple[int, int],
    members: int,
    *,
    by: Axis,
) -> TileOperand:
    """The words of pair bits, for a kernel with rows ``by`` "q" or "kv"."""
    found = bit_words.placed(x, sizes, by)
    words = found.words
    return TileOperand(
        words.reshape(-1, *words.shape[2:]),
        head_of_array((words.shape[0], words.shape[1]), batch_and_heads, members),
        found.start,
        width=found.width,
        step=found.step,
    )


def dropout_factor(call: Call, q_seeds: Any, kv_seeds: Any) -> jax.Array | None:
    """The dropout factor of the weights of a tile; None without dropout."""
    if not call.dropout_rate:
        return None
    return dropout.factor(q_seeds, kv_seeds, call.dropout_rate)


def to_column(row: jax.Array) -> jax.Array:
    """``[1, n]`` as ``[n, 1]``."""
    if row.dtype == jnp.bool_:
        return to_column(row.astype(jnp.float32)) > 0
    # The chip transposes whole registers, which have 8 sublanes.
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def to_row(column: jax.Array) -> jax.Array:
    """``[n, 1]`` as ``[1, n]``."""
    return jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def rows_kept(x: jax.Array, where: jax.Array) -> jax.Array:
    """``x`` with 0 in the rows where the bool column ``where`` is false."""
    return jnp.where(where, x, jnp.zeros_like(x))


def column_ids(block: Any, size: int) -> jax.Array:
    """The positions of a block, int32 ``[size, 1]``."""
    return block * size + lax.broadcasted_iota(jnp.int32, (size, 1), 0)


def row_ids(block: Any, size: int) -> jax.Array:
    """The positions of a block, int32 ``[1, size]``."""
    return block * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
