"""Counts the tiles, FLOPs and bytes of a call from its plans.

Tiles and FLOPs are exact: they are those that the kernels execute. Bytes follow a
model: every row of blocks reads its own data once, and each block that it visits once.
If a cache holds what rows share, memory is read less often, at the least each array
once. The lists of runs and the arrays of predicates are left out: they are small.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lowering import ir, planning
from lowering.expr.simplify import simplify
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Masks
from pallas_kernels.tpu import segments
from pallas_kernels.triton.tiles import power_of_two
from pallas_kernels.xla.heads import head_groups
from pallas_kernels.xla.walks import CHUNK, SHORT, chunk_slots, split

# Bytes of a float32: row statistics and sums of gradients have that type.
SINGLE = 4


@dataclass(frozen=True, kw_only=True)
class CallSizes:
    """The sizes of a call that its plans do not hold.

    ``itemsize`` is the bytes of an entry of q, k, v inside the kernel: the TPU kernels
    widen float16 to 4 bytes.
    """

    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    itemsize: int
    impl: str

    @property
    def dims(self) -> tuple[int, int]:
        """``head_dim, head_dim_v`` as the kernels multiply them."""
        dims = self.head_dim, self.head_dim_v
        if self.impl != "triton":
            return dims
        return power_of_two(dims[0]), power_of_two(dims[1])

    @property
    def exact_products(self) -> bool:
        """Whether matrix products are in float32: "xla" widens all operands."""
        return self.itemsize == SINGLE or self.impl == "xla"


@dataclass(frozen=True)
class BlockCounts:
    """The blocks of a plan by distinct map, and how many heads have each map."""

    full: tuple[int, ...]
    partial: tuple[int, ...]
    heads: tuple[int, ...]
    num_blocks: int  # of one map
    num_runs: int  # of all maps

    @property
    def visited(self) -> tuple[int, ...]:
        """Full and partial blocks of each map."""
        return tuple(a + b for a, b in zip(self.full, self.partial, strict=True))

    @property
    def empty(self) -> tuple[int, ...]:
        """Blocks of each map that are never visited."""
        return tuple(self.num_blocks - n for n in self.visited)

    def over_heads(self, counts: Iterable[int]) -> int:
        """The sum over all heads; ``counts`` has one number for each map."""
        return sum(n * h for n, h in zip(counts, self.heads, strict=True))

    def of_call(self, batch: int) -> tuple[int, int, int]:
        """Full, partial and empty blocks over all batch rows and heads."""
        full, partial, empty = (
            batch * self.over_heads(x) for x in (self.full, self.partial, self.empty)
        )
        return full, partial, empty


def blocks(mask: BlockMask) -> BlockCounts:
    """Counts the blocks of a plan on host arrays."""
    full, partial = (counts.sum(axis=1) for counts in _of_rows(mask))
    heads = np.bincount(np.asarray(mask.map_of_head), minlength=mask.num_maps)
    return BlockCounts(
        full=tuple(full.tolist()),
        partial=tuple(partial.tolist()),
        heads=tuple(heads.tolist()),
        num_blocks=mask.num_rows * mask.num_columns,
        num_runs=len(mask.run_start),
    )


def _of_rows(mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    """Full and partial blocks of every row, ``[maps, rows]`` each."""
    ptr = np.asarray(mask.row_ptr)
    length = np.asarray(mask.run_stop).astype(np.int64) - np.asarray(mask.run_start)
    full = np.asarray(mask.run_full) != 0
    shape = mask.num_maps, mask.num_rows

    def sums(x: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0], np.cumsum(x)])
        return (before[ptr[1:]] - before[ptr[:-1]]).reshape(shape)

    return sums(np.where(full, length, 0)), sums(np.where(full, 0, length))


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one kernel in a whole call: all batch rows, all heads.

    Tiles are the blocks that the kernel processes. Padded tiles fill up a loop of equal
    steps and add nothing; empty blocks are never visited. FLOPs are those of the matrix
    products; a multiplication and an addition are two. ``bytes`` counts each block as
    often as it is visited, ``least_bytes`` counts every array once.
    """

    name: str
    num_full: int = 0
    num_partial: int = 0
    num_padded: int = 0
    num_empty: int = 0
    flops: int = 0
    bytes: int
    least_bytes: int

    @property
    def num_tiles(self) -> int:
        """The number of all tiles: full, partial and padded."""
        return self.num_full + self.num_partial + self.num_padded


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The work of a call: the forward pass, and the backward pass without the forward.

    ``permutation_bytes`` is the memory traffic of moving arrays to another order of
    positions and back: once in the forward pass, and once in the backward pass.
    """

    forward: Work
    backward: tuple[Work, ...]
    exact_products: bool
    permutation_bytes: int = 0

    def works(self, backward: bool) -> tuple[Work, ...]:
        """The kernels of one of the passes."""
        return self.backward if backward else (self.forward,)

    def flops(self, *, backward: bool = False) -> int:
        """FLOPs of all products of a pass."""
        return sum(work.flops for work in self.works(backward))

    def bytes(self, *, backward: bool = False) -> int:
        """Bytes that a pass moves, with those of the permutation."""
        moved = sum(work.bytes for work in self.works(backward))
        return moved + self.permutation_bytes

    def least_bytes(self, *, backward: bool = False) -> int:
        """Bytes that a pass moves if a cache holds what rows share."""
        moved = sum(work.least_bytes for work in self.works(backward))
        return moved + self.permutation_bytes

    def intensity(self, *, backward: bool = False) -> float:
        """FLOPs per byte."""
        return self.flops(backward=backward) / max(self.bytes(backward=backward), 1)


def cost(masks: Masks, sizes: CallSizes, permutation_bytes: int = 0) -> Cost:
    """The cost of a call with the plans ``masks``, which are NumPy arrays."""
    works = {"xla": _xla, "tpu": _tpu, "triton": _triton}[sizes.impl]
    forward, *backward = works(masks, sizes)
    return Cost(
        forward=forward,
        backward=tuple(backward),
        exact_products=sizes.exact_products,
        permutation_bytes=permutation_bytes,
    )


def _triton(masks: Masks, sizes: CallSizes) -> list[Work]:
    """The work of the Triton kernels: forward, dq, dkv."""
    d, dv = sizes.dims
    both, item = d + dv, sizes.itemsize
    return [
        _forward(masks, sizes),
        # q, dq, do; lse, delta. k, v. The products s, dp, dq.
        _kernel("dq", masks.dq, sizes, (
            (d + both) * item + 2 * SINGLE, both * item, d + both
        )),
        # k, v, dk, dv. q, do; lse, delta. The products s, dp, dk, dv.
        _kernel("dkv", masks.dkv, sizes, (
            2 * both * item, both * item + 2 * SINGLE, 2 * both
        )),
        _delta(masks, sizes),
    ]  # fmt: skip


def _tpu(masks: Masks, sizes: CallSizes) -> list[Work]:
    """The work of the TPU kernels: forward, and one for dq, dk and dv."""
    d, dv = sizes.dims
    both, item = d + dv, sizes.itemsize
    mask, group = masks.dkv, sizes.num_q_heads // sizes.num_kv_heads
    plan = segments.plan_of(mask, group, d)
    rows, adding = segments.count_rows(plan, sizes.num_kv_heads)
    keys = sizes.batch * mask.block_kv * both
    # A row reads k and v. It writes dk and dv, as f32 sums if there are several
    # segments, and then reads the sums of earlier rows. XLA rounds the sums at last.
    several = plan.segments.count > 1
    own = keys * rows * (item + (SINGLE if several else item)) + keys * adding * SINGLE
    if several:
        own += keys * sizes.num_kv_heads * mask.num_rows * (SINGLE + item)
    own += sizes.batch * sizes.num_q_heads * mask.num_columns * mask.block_q * d * item
    # Of each tile: q, do; lse, delta. The products s, dp, dq, dk, dv.
    backward = _kernel("backward", mask, sizes, (
        0, both * item + 2 * SINGLE, d + 2 * both
    ))  # fmt: skip
    backward = replace(
        backward, bytes=backward.bytes + own, least_bytes=backward.least_bytes + own
    )
    return [_forward(masks, sizes), backward, _delta(masks, sizes)]


def _forward(masks: Masks, sizes: CallSizes) -> Work:
    both, item = sum(sizes.dims), sizes.itemsize
    # q, o; lse. k, v. The products s, o.
    each = both * item + SINGLE, both * item, both
    return _kernel("forward", masks.forward, sizes, each)


def _kernel(
    name: str, mask: BlockMask, sizes: CallSizes, each: tuple[int, int, int]
) -> Work:
    """The work of a kernel that walks the blocks of a mask, head by head.

    ``each`` are the bytes of a position of a row, those of a position of a block along
    the row, and the sum of the contracted lengths of the products of a tile.
    """
    of_row, of_column, dims = each
    full, partial, empty = blocks(mask).of_call(sizes.batch)
    row, column = mask.block_q, mask.block_kv
    row_heads, column_heads = sizes.num_q_heads, sizes.num_kv_heads
    if mask.by == "kv":
        row, column = column, row
        row_heads, column_heads = column_heads, row_heads
    rows = sizes.batch * row_heads * mask.num_rows * row
    columns = sizes.batch * column_heads * mask.num_columns * column
    tiles = full + partial
    own, read = rows * of_row, tiles * column
    return Work(
        name=name,
        num_full=full,
        num_partial=partial,
        num_empty=empty,
        flops=2 * tiles * row * column * dims,
        bytes=own + read * of_column,
        least_bytes=own + min(read, columns) * of_column,
    )


def _delta(masks: Masks, sizes: CallSizes) -> Work:
    """The work of ``delta = rowsum(do * o)``, with which the backward pass starts."""
    rows = sizes.batch * sizes.num_q_heads * masks.forward.q_seq_len
    moved = rows * (2 * sizes.head_dim_v * sizes.itemsize + SINGLE)
    return Work(name="delta", bytes=moved, least_bytes=moved)


def _xla(masks: Masks, sizes: CallSizes) -> list[Work]:
    """The work of the loops of "xla": one sweep a pass, both over rows of queries.

    Query heads with the same map and the same key head share what they read. The
    backward sweep adds to the gradients of keys and values in memory, in float32.
    """
    d, dv = sizes.head_dim, sizes.head_dim_v
    both, item = d + dv, sizes.itemsize
    groups = head_groups(
        tuple(np.asarray(masks.forward.map_of_head).tolist()),
        tuple(range(masks.forward.num_maps)),
        sizes.num_kv_heads,
    )
    reads = [(group.map_index, len(group.kv_heads)) for group in groups]

    def sweep(name: str, mask: BlockMask) -> Work:
        count, slots = blocks(mask), _slots(mask)
        tiles = sizes.batch * count.over_heads(slots)
        full, partial, empty = count.of_call(sizes.batch)
        rows = sizes.batch * sizes.num_q_heads * mask.num_rows * mask.block_q
        gathered = sizes.batch * mask.block_kv * sum(slots[m] * h for m, h in reads)
        keys = sizes.batch * mask.block_kv * mask.num_columns * sum(h for _, h in reads)
        # q, o; lse. k, v. The products s, o.
        own, other, dims = rows * (both * item + SINGLE), both * item, both
        if name == "backward":
            # q, dq, do; lse, delta. The sums start from zeros, and are rounded at last.
            own = rows * ((d + both) * item + 2 * SINGLE)
            own += keys * both * (2 * SINGLE + item)
            # k, v; the sums read and written. The products s, dp, dq, dk, dv.
            other, dims = both * (item + 2 * SINGLE), d + 2 * both
        return Work(
            name=name,
            num_full=full,
            num_partial=partial,
            num_padded=tiles - full - partial,
            num_empty=empty,
            flops=2 * tiles * mask.block_q * mask.block_kv * dims,
            bytes=own + gathered * other,
            least_bytes=own + min(gathered, keys) * other,
        )

    return [
        sweep("forward", masks.forward),
        sweep("backward", masks.dq),
        _delta(masks, sizes),
    ]


def _slots(mask: BlockMask) -> tuple[int, ...]:
    """Blocks that "xla" processes for each map: rows are padded to few equal shapes."""

    def of_map(full: np.ndarray, partial: np.ndarray) -> int:
        short, long = split(full, partial, mask.block_kv, (SHORT, CHUNK))
        found = len(short) * sum(int(x[short].max(initial=0)) for x in (full, partial))
        for count in (full[long], partial[long]) if long.size else ():
            width = chunk_slots(count, max(1, CHUNK // mask.block_kv))
            found += int((-(-count // width)).sum()) * width
        return found

    return tuple(of_map(*rows) for rows in zip(*_of_rows(mask), strict=True))


def permutation_bytes(
    sizes: CallSizes, given: tuple[int, int], slots: tuple[int, int]
) -> int:
    """Bytes to read and write q, k, v, o and lse once, for another order of positions.

    ``given`` are the numbers of queries and of keys, ``slots`` the numbers of slots of
    the other order, padding included.
    """
    both = (sizes.head_dim + sizes.head_dim_v) * sizes.itemsize
    queries, keys = (a + b for a, b in zip(given, slots, strict=True))
    of_queries = sizes.num_q_heads * queries * (both + SINGLE)
    return sizes.batch * (of_queries + sizes.num_kv_heads * keys * both)


def dense(masks: Masks) -> Masks:
    """Plans of all pairs with the blocks and the heads of ``masks``."""
    return _same_blocks(masks, ir.Bool(True))


def dense_causal(masks: Masks, q_offset: int = 0) -> Masks:
    """Plans of ``k <= q + q_offset`` with the blocks and the heads of ``masks``."""
    return _same_blocks(masks, ir.Le(ir.K, ir.Add(ir.Q, ir.Const(q_offset))))


def _same_blocks(masks: Masks, node: ir.Pred) -> Masks:
    def of(mask: BlockMask) -> BlockMask:
        sizes = planning.BlockSizes(
            mask.q_seq_len, mask.kv_seq_len, mask.block_q, mask.block_kv
        )
        map_of_head = (0,) * len(mask.map_of_head)
        return planning.plan((simplify(node),), map_of_head, sizes, by=mask.by)

    return Masks(*(of(mask) for mask in masks))


def padding_waste(pairs: int, forward: Work, mask: BlockMask) -> float:
    """The share of the pairs that the forward pass computes but that do not attend.

    ``pairs`` is the number of pairs that attend, over all batch rows and heads;
    ``mask`` is the forward plan.
    """
    computed = forward.num_tiles * mask.block_q * mask.block_kv
    return 1 - pairs / computed if computed else 0.0
