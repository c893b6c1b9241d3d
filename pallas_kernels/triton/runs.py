"""Run lists for the Triton kernels, and the loop over the runs of one row."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels import bits
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Masks, PairBits, Vectors
from pallas_kernels.pages import place_in_page
from pallas_kernels.triton import tiles

Int32s = Array | np.ndarray


class Runs(NamedTuple):
    """The arrays of a plan, or their refs in a kernel, which reads single scalars."""

    row_ptr: Int32[Int32s, " rows_plus_1"]
    start: Int32[Int32s, " runs"]
    stop: Int32[Int32s, " runs"]
    full: Int32[Int32s, " runs"]
    map_of_head: Int32[Int32s, " heads"]  # or [batch * heads]
    # The rows of a map, sorted by their number of blocks, largest first.
    order: Int32[Int32s, " rows"]
    # None if the test of a head is the number of its map, or is known statically.
    test_of_head: Int32[Int32s, " heads"] | None = None
    # The number of blocks in all runs before a run; only if programs share a row.
    before: Int32[Int32s, " runs_plus_1"] | None = None


@dataclass(frozen=True)
class TritonSizes:
    """The static sizes of a plan. A row is a query block, or a key block for dkv."""

    q_seq_len: int
    kv_seq_len: int
    block_q: int
    block_kv: int
    num_rows: int
    num_maps: int
    # Whether the plan can have such runs; the kernel has no code for an absent kind.
    has_full: bool
    has_partial: bool
    # The test that all heads share, if it is static. None: see Runs.test_of_head.
    test: int | None = None
    # The programs that share a row, and the keys of a page if keys lie in pages.
    parts: int = 1
    page_size: int | None = None

    @property
    def padded_q(self) -> int:
        """The number of queries, rounded up to whole blocks."""
        return -(-self.q_seq_len // self.block_q) * self.block_q

    @property
    def padded_kv(self) -> int:
        """The number of keys, rounded up to whole blocks."""
        return -(-self.kv_seq_len // self.block_kv) * self.block_kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TritonPlan:
    """The runs of one kernel and their sizes."""

    runs: Runs
    sizes: TritonSizes = field(metadata={"static": True})


class TritonLists(NamedTuple):
    """The plans of the three kernels."""

    forward: TritonPlan
    dq: TritonPlan
    dkv: TritonPlan


def prepare(masks: Masks, call: Call, inputs: Inputs) -> TritonLists:
    """The plans of the three kernels; traced run lists are used unchanged.

    Raises:
      ValueError: a block size or number of warps that Triton does not support.
    """
    del inputs
    chosen = call.tiles.forward, call.tiles.dq, call.tiles.dkv
    for mask, tile in zip(masks, chosen, strict=True):
        tiles.check(mask, tile)
    return TritonLists(*(plan_of(mask) for mask in masks))


def plan_of(mask: BlockMask) -> TritonPlan:
    """The runs and sizes of a plan."""
    host = all(isinstance(x, np.ndarray) for x in jax.tree.leaves(mask))
    np_or_jnp = np if host else jnp
    count = mask.run_start.shape[0]

    def filled(x: Int32s) -> Int32s:
        # A kernel operand cannot have size 0.
        return x if count else np_or_jnp.zeros(1, np.int32)

    given = mask.test_of_map is not None
    test = _single_test(mask)
    runs = Runs(
        row_ptr=mask.row_ptr,
        start=filled(mask.run_start),
        stop=filled(mask.run_stop),
        full=filled(mask.run_full),
        map_of_head=mask.map_of_head,
        order=_order(mask, np_or_jnp),
        test_of_head=mask.test_of_head if test is None and given else None,
    )
    sizes = TritonSizes(
        q_seq_len=mask.q_seq_len,
        kv_seq_len=mask.kv_seq_len,
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        num_rows=mask.num_rows,
        num_maps=mask.num_maps,
        has_full=bool(np.any(mask.run_full)) if host else True,
        has_partial=not np.all(mask.run_full) if host else True,
        test=test,
    )
    return TritonPlan(runs, sizes)


def _single_test(mask: BlockMask) -> int | None:
    """The test that all heads share, or None if there are several or it is traced."""
    if mask.test_of_map is None:
        return 0 if mask.num_maps == 1 else None
    known = isinstance(mask.test_of_map, np.ndarray)
    tests = np.unique(mask.test_of_map) if known else ()
    return int(tests[0]) if len(tests) == 1 else None


def _order(mask: BlockMask, np_or_jnp: Any) -> Int32s:
    """The rows, sorted by their number of blocks over all maps, largest first."""
    # Programs start in this order, so the short rows fill the GPU at the end.
    before = blocks_before(mask, np_or_jnp)
    total = before[mask.row_ptr[1:]] - before[mask.row_ptr[:-1]]
    blocks = total.reshape(mask.num_maps, mask.num_rows).sum(axis=0, dtype=np.int32)
    return np_or_jnp.argsort(-blocks, stable=True).astype(np.int32)


def blocks_before(mask: BlockMask, np_or_jnp: Any) -> Int32s:
    """The number of blocks in all runs before each run, and in all of them."""
    start = np_or_jnp.zeros(1, np.int32)
    length = mask.run_stop - mask.run_start
    return np_or_jnp.concatenate([start, np_or_jnp.cumsum(length, dtype=np.int32)])


def first_of_batch(runs: Any, sizes: TritonSizes, num_heads: int) -> Any:
    """The index of the first head of a program's batch entry in ``map_of_head``.

    None means 0: all batch entries share one list of heads.
    """
    if sizes.num_maps == 1 or runs.map_of_head.shape[0] == num_heads:
        return None
    return pl.program_id(2) * num_heads


def map_and_test(
    runs: Any, sizes: TritonSizes, head: Any, first: Any
) -> tuple[jax.Array, jax.Array]:
    """The map of a query head and its test; ``first`` is from ``first_of_batch``."""
    at = head if first is None else first + head
    index = runs.map_of_head[at] if sizes.num_maps > 1 else jnp.int32(0)
    if sizes.test is not None:
        return index, jnp.int32(sizes.test)
    return index, index if runs.test_of_head is None else runs.test_of_head[at]


def blocks_of_part(runs: Any, sizes: TritonSizes, row: Any, part: Any) -> Any:
    """``blocks(r)``, the range of blocks of run ``r`` that belongs to a part of a row.

    The parts have equally many blocks of the row, up to one.
    """
    if sizes.parts == 1:
        return lambda r: (runs.start[r], runs.stop[r])
    first = runs.before[runs.row_ptr[row]]
    total = runs.before[runs.row_ptr[row + 1]] - first
    begin = first + jax.lax.div(total * part, jnp.int32(sizes.parts))
    end = first + jax.lax.div(total * (part + 1), jnp.int32(sizes.parts))

    def blocks(r: Any) -> tuple[Any, Any]:
        start, stop = runs.start[r], runs.stop[r]
        here = start - runs.before[r]
        return jnp.maximum(start, here + begin), jnp.minimum(stop, here + end)

    return blocks


def fold_runs(
    runs: Any, sizes: TritonSizes, row: Any, *, full: Any, partial: Any, carry: Any,
    part: Any = 0,
) -> Any:  # fmt: skip
    """Computes ``carry = full(block, carry)``, or ``partial``, for each block of a row.

    ``row`` counts over all maps. A run has two loops, for full and for partial blocks,
    one of which is empty. Only the blocks of ``part`` are visited.
    """
    blocks = blocks_of_part(runs, sizes, row, part)

    def run(r: Any, carry: Any) -> Any:
        start, stop = blocks(r)
        if not sizes.has_partial:
            middle = stop
        elif not sizes.has_full:
            middle = start
        else:
            middle = jnp.where(runs.full[r] != 0, stop, start)
        if sizes.has_full:
            carry = jax.lax.fori_loop(start, middle, full, carry)
        if sizes.has_partial:
            carry = jax.lax.fori_loop(middle, stop, partial, carry)
        return carry

    return jax.lax.fori_loop(runs.row_ptr[row], runs.row_ptr[row + 1], run, carry)


def fold_runs_tested(
    runs: Any, sizes: TritonSizes, row: Any, partial: Any, carry: Any, part: Any = 0
) -> Any:
    """``fold_runs`` with every block treated as partial."""
    blocks = blocks_of_part(runs, sizes, row, part)

    def run(r: Any, carry: Any) -> Any:
        start, stop = blocks(r)
        return jax.lax.fori_loop(start, stop, partial, carry)

    return jax.lax.fori_loop(runs.row_ptr[row], runs.row_ptr[row + 1], run, carry)


def columns_of(block: Any, sizes: TritonSizes, pages: Any) -> tuple:
    """Where the keys of a block lie: their rows, after the page if there are pages."""
    size = sizes.block_kv
    if sizes.page_size is None:
        return (pl.ds(block * size, size),)
    column, first = place_in_page(block, size, sizes.page_size)
    return pages[column], pl.ds(first, size)


def block_ids(block: Any, size: int, axis: int) -> jax.Array:
    """The positions of a block, int32 ``[size, 1]`` (``axis=0``) or ``[1, size]``."""
    shape = (size, 1) if axis == 0 else (1, size)
    return block * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def along(x: jax.Array, axis: int) -> jax.Array:
    """``x [n]`` as ``[n, 1]`` (``axis=0``) or ``[1, n]`` (``axis=1``)."""
    return jnp.expand_dims(x, 1 - axis)


def rows_kept(x: jax.Array, where: jax.Array) -> jax.Array:
    """``x [n, dim]`` with 0 in the rows where the bool ``where [n]`` is false."""
    return jnp.where(jnp.expand_dims(where, 1), x, jnp.zeros_like(x))


def bit_tiles(
    vectors: Vectors, sizes: TritonSizes, q_block: Any, kv_block: Any, *,
    transposed: bool, member: Any = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The bool tiles of the pair bits: ``[q, k]``, or ``[k, q]`` if ``transposed``.

    Refs of words have an axis of heads only if ``member``, the index of the head in its
    group, is given.
    """
    block_q, block_kv = sizes.block_q, sizes.block_kv

    def tile(x: PairBits) -> jax.Array:
        plane, start = bits.window(
            x, q_block, kv_block, block_q=block_q, kv_seq_len=sizes.kv_seq_len
        )
        here, lead = pl.ds(start, block_q), ()
        if x.queries_per_word > 1:
            query = jax.lax.broadcasted_iota(jnp.int32, (block_q,), 0)
            here = start + bits.quotient(query, x.queries_per_word)
        if member is not None:
            lead = (0 if x.words.shape[0] == 1 else member,)
        words = [
            along(x.words[*lead, plane, w, here], 1 if transposed else 0)
            for w in range(x.words.shape[-2])
        ]
        number = x.bit[pl.ds(kv_block * block_kv, block_kv)]
        return bits.tile(words, along(number, 0 if transposed else 1))

    return tuple(tile(x) for x in vectors.bits)


def allowed(
    call: Call, sizes: TritonSizes, test: Any, ids: tuple[Any, Any], vectors: tuple
) -> jax.Array:
    """The allowed pairs of a partial tile, bool; ``ids`` are ``(q_ids, k_ids)``.

    ``vectors`` are those of the queries, those of the keys, and the tiles of pair bits.
    """
    q_ids, k_ids = ids
    pairs = call.predicate(test, q_ids, k_ids, *vectors)
    if sizes.padded_kv != sizes.kv_seq_len:
        pairs = pairs & (k_ids < sizes.kv_seq_len)
    if sizes.padded_q != sizes.q_seq_len:
        # A key that only padded queries see counts as not seen.
        pairs = pairs & (q_ids < sizes.q_seq_len)
    return jnp.broadcast_to(pairs, jnp.broadcast_shapes(q_ids.shape, k_ids.shape))
