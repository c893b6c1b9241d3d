"""Attention of few queries over a long cache, on CPUs: a loop over its live blocks.

The cache stays as it is, ``[batch, kv_heads, slots, dim]`` or in pages. Each step
slices one key block of all heads, so the time follows the blocks of the plan and not
the length of the cache. Batch entries and heads with a plan of their own loop alone.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import softmax
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Outputs, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.pages import FewSizes, Pages
from pallas_kernels.precision import wide
from pallas_kernels.varying import vary
from pallas_kernels.xla import tile
from pallas_kernels.xla.forward import fold_tiles
from pallas_kernels.xla.traced_walks import Owner, for_owners
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan
from pallas_kernels.xla.walks import head_maps, head_tests

# The keys of a block: each step of the loop has a fixed cost.
KEYS = 512
# A divisor of the length is taken if it is at least this.
SMALL = 128


def default_tile(sizes: FewSizes, dtype: Any) -> Tile:
    """All rows in one block, and a block of keys that divides pages."""
    del dtype
    length = max(sizes.longest, 1)
    block = length
    if length > KEYS:
        divisor = max(d for d in range(1, KEYS + 1) if length % d == 0)
        block = divisor if sizes.page_size or divisor >= SMALL else KEYS
    return Tile(block_q=sizes.rows, block_kv=block)


def attend(
    inputs: Inputs, vectors: Vectors, mask: BlockMask, call: Call, pages: Pages | None
) -> Outputs:
    """Attention over the blocks of a plan with one row; ``k`` and ``v`` may be paged.

    Values that are channels of the keys (``Call.values``) are cut from each block.
    """
    assert mask.num_rows == 1
    batch, heads, _, _ = inputs.q.shape
    if not mask.run_start.shape[0]:
        return _empty(inputs)
    cache = _Cache(inputs.k, inputs.v, mask, call, pages)
    plan = XlaPlan((), mask.block_q, mask.block_kv)
    lists = XlaLists(plan, plan, head_maps(mask), head_tests(mask))
    # The owners slice the arrays that they get: the cache is not one of them.
    none = jnp.zeros((batch, heads, 0, 0), inputs.k.dtype)
    run = partial(_attend, cache=cache, plan=plan)
    vectors = jax.tree.map(jnp.asarray, vectors)
    return Outputs(*for_owners(run, Inputs(inputs.q, none, none), vectors, lists))


def _empty(inputs: Inputs) -> Outputs:
    q, _, v = inputs
    lse = jnp.full(q.shape[:3], -jnp.inf, wide(q.dtype))
    return Outputs(jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), lse)


class _Cache(NamedTuple):
    """The keys and values of a call, and the plan of the blocks to read."""

    k: Array
    v: Array
    mask: BlockMask
    call: Call
    pages: Pages | None

    def read(self, block: Array, owner: Owner) -> tuple[Array, Array]:
        """The keys and values of a block, ``[batch or 1, heads or 1, block, dim]``."""
        k = self._read(self.k, block, owner)
        values = self.call.values
        v = self._read(self.v, block, owner) if values is None else k
        return k, v if values is None else v[..., slice(*values)]

    def _read(self, x: Array, block: Array, owner: Owner) -> Array:
        # XLA:CPU slices no 16-bit floats, and would convert the whole cache before the
        # loop. Behind a barrier with the loop's index, it converts what it slices.
        x, block = jax.lax.optimization_barrier((x, block))
        size, zero = self.mask.block_kv, jnp.int32(0)
        batch = zero if owner.batch is None else owner.batch
        head = zero if owner.head is None else owner.head
        heads = x.shape[1] if owner.head is None else 1
        if self.pages is not None:
            # Each batch entry has pages, and so a plan, of its own.
            column, first = self.pages.place(block, size)
            page = jnp.asarray(self.pages.table)[batch, column]
            shape = 1, heads, size, x.shape[3]
            found = jax.lax.dynamic_slice(x, (page, head, first, zero), shape)
            return found.astype(wide(x.dtype))
        entries = x.shape[0] if owner.batch is None else 1

        def sliced(length: int) -> Array:
            first = batch, head, block * size, zero
            shape = entries, heads, length, x.shape[3]
            return jax.lax.dynamic_slice(x, first, shape).astype(wide(x.dtype))

        left = x.shape[2] % size
        if not left:
            return sliced(size)
        # A slice that reaches beyond the end would be moved to end there.
        short = [(0, 0), (0, 0), (0, size - left), (0, 0)]
        if x.shape[2] < size:
            return jnp.pad(sliced(left), short)
        return jax.lax.cond(
            block == x.shape[2] // size,
            lambda: jnp.pad(sliced(left), short),
            lambda: sliced(size),
        )


def _attend(owner: Owner, *, cache: _Cache, plan: XlaPlan) -> tuple[Array, Array]:
    mask, call = cache.mask, cache.call
    batch, heads, rows, _ = owner.inputs.q.shape
    dtype, row = wide(owner.inputs.q.dtype), jnp.int32(0)
    lengths = rows, mask.kv_seq_len
    pairs = tile.pairs_of(call, owner.vectors, owner.heads, plan, lengths)
    q = owner.inputs.q.astype(dtype) * call.scale
    every = tile.shown(jnp.ones((1, 1, 1, 1, plan.block_kv), bool), padding=True)

    def visit(block: Array, state: Any, *, full: bool) -> Any:
        at = block[None]
        shown = every if full else tile.shown(pairs.allowed(row, at))
        shown = pairs.with_scores(shown, row, at)
        k, v = cache.read(block, owner)
        s = tile.masked(tile.scores(q, k, 1, call), shown)[:, :, 0]
        if shown.seen is not None:
            v = jnp.where(shown.seen[..., None], v, 0.0)
        return fold_tiles(call.unit, state, s, v)

    start, stop, kind, ptr = (
        jnp.asarray(x)
        for x in (mask.run_start, mask.run_stop, mask.run_full, mask.row_ptr)
    )

    def visit_run(run: Array, state: Any) -> Any:
        middle = jnp.where(kind[run] != 0, stop[run], start[run])
        for full, ends in ((True, (start[run], middle)), (False, (middle, stop[run]))):
            state = jax.lax.fori_loop(*ends, partial(visit, full=full), state)
        return state

    head_dim_v = cache.v.shape[-1]
    empty = softmax.start(rows, head_dim_v, dtype=dtype)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, heads, *x.shape)), empty)
    state = vary(state, q, cache.k)
    state = jax.lax.fori_loop(ptr[owner.walk], ptr[owner.walk + 1], visit_run, state)
    found = softmax.finish(state, call.unit)
    return found.o.astype(owner.inputs.q.dtype), found.lse[..., 0]
