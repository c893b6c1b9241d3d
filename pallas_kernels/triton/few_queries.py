"""Attention of few queries over a long cache, on GPUs: keys split over programs.

The blocks that a row visits are dealt out to several programs in equal parts, and the
parts are merged by their log-sum-exps (Dao et al., Flash-Decoding, 2023). So a GPU is
busy wherever the visited blocks lie.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import bits
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Outputs, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.pages import FewSizes, Pages
from pallas_kernels.triton import tiles
from pallas_kernels.triton.channels import padded_dim
from pallas_kernels.triton.forward import forward_kernel
from pallas_kernels.triton.launch import (
    compiler_params,
    everything,
    pad,
    pad_vectors,
    rows_first,
    vector_specs,
    whole,
)
from pallas_kernels.triton.runs import TritonPlan, blocks_before, plan_of
from pallas_kernels.varying import shape_like

# Programs that fill a large GPU, of 132 multiprocessors, twice.
PROGRAMS = 264
# Blocks that a part should have at least: a part has fixed costs.
LEAST = 2


def default_tile(sizes: FewSizes, dtype: Any) -> Tile:
    """The tile of the forward kernel for few rows; a page is a multiple of its keys.

    Raises:
      ValueError: a page is no multiple of the smallest block.
    """
    lengths = sizes.rows, sizes.longest
    dims = sizes.head_dim, sizes.head_dim
    tile = replace(tiles.default_tiles(lengths, *dims, dtype).forward, num_warps=4)
    if sizes.page_size is None or not sizes.page_size % tile.block_kv:
        return tile
    divisor = sizes.page_size & -sizes.page_size
    if divisor < tiles.SMALLEST:
        raise ValueError(
            f"page_size={sizes.page_size}: impl='triton' needs pages of a multiple of "
            f"{tiles.SMALLEST} keys"
        )
    return replace(tile, block_kv=divisor)


def attend(
    inputs: Inputs, vectors: Vectors, mask: BlockMask, call: Call, pages: Pages | None
) -> Outputs:
    """Attention over the blocks of ``mask``; ``k`` and ``v`` may be paged.

    Raises:
      ValueError: a block size or number of warps that Triton does not support.
    """
    tile = call.tiles.forward
    tiles.check(mask, tile)
    bits.check(vectors.bits, (mask.block_q, mask.block_kv))
    batch, heads, rows, _ = inputs.q.shape
    plan = _plan(mask, batch * heads, pages)
    sizes = plan.sizes
    padded = _padded(inputs, plan, call, pages)
    vectors = pad_vectors(vectors, sizes)
    length, head_dim_v = sizes.parts * sizes.padded_q, inputs.v.shape[-1]
    dtype = inputs.q.dtype if sizes.parts == 1 else jnp.float32
    shape = batch, length, heads, tiles.power_of_two(head_dim_v)
    o = shape_like(shape, dtype, padded.q)
    lse = shape_like((batch, heads, length), jnp.float32, padded.q)
    table = None if pages is None else pages.table
    o, lse, _ = pl.pallas_call(
        partial(forward_kernel, sizes=sizes, call=call, num_heads=heads),
        grid=(sizes.num_rows * sizes.parts, heads, batch),
        in_specs=[
            jax.tree.map(everything, plan.runs),
            _specs(padded, pages),
            vector_specs(vectors),
            None if table is None else _of_entry(table),
        ],
        out_specs=[whole(o), whole(lse), whole(lse)],
        out_shape=[o, lse, lse],
        compiler_params=compiler_params(tile),
        interpret=call.interpret,
    )(plan.runs, padded, vectors, table)
    o = jnp.swapaxes(o[..., :head_dim_v], 1, 2)
    o = o.reshape(batch, heads, sizes.parts, sizes.padded_q, head_dim_v)
    lse = lse.reshape(batch, heads, sizes.parts, sizes.padded_q)
    o, lse = o[:, :, :, :rows], lse[..., :rows]
    if sizes.parts == 1:
        return Outputs(o[:, :, 0], lse[:, :, 0])
    o, lse = merged(o, lse)
    return Outputs(o.astype(inputs.q.dtype), lse)


def merged(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One softmax of disjoint parts along axis 2, ``o [..., dim]`` and ``lse``."""
    most = jnp.max(lse, axis=2, keepdims=True)
    most = jnp.where(jnp.isneginf(most), 0.0, most)
    weight = jnp.exp(lse - most)
    total = jnp.sum(weight, axis=2)
    share = weight / jnp.where(total == 0, 1.0, total)[:, :, None]
    # A part without a key has output 0.
    return jnp.sum(share[..., None] * o, axis=2), most[:, :, 0] + jnp.log(total)


def _plan(mask: BlockMask, owners: int, pages: Pages | None) -> TritonPlan:
    plan = plan_of(mask)
    wanted = -(-PROGRAMS // (owners * plan.sizes.num_rows))
    parts = max(1, min(wanted, mask.max_blocks // LEAST))
    page_size = None if pages is None else pages.size
    sizes = replace(plan.sizes, parts=parts, page_size=page_size)
    runs = plan.runs
    if parts > 1:
        host = all(isinstance(x, np.ndarray) for x in jax.tree.leaves(mask))
        runs = runs._replace(before=blocks_before(mask, np if host else jnp))
    return TritonPlan(runs, sizes)


def _padded(
    inputs: Inputs, plan: TritonPlan, call: Call, pages: Pages | None
) -> Inputs:
    """The inputs as the kernel reads them: keys keep their heads in front.

    A cache is copied if its slots are no multiple of a block, or its channels no power
    of two.
    """
    sizes = plan.sizes

    def keys(x: jax.Array, dim: int) -> jax.Array:
        x = x if pages is not None else pad(x, 2, sizes.padded_kv)
        return pad(x, 3, dim)

    q, k, v = inputs
    own: Any = None
    if not call.values:
        own = keys(v, tiles.power_of_two(v.shape[3]))
    q = rows_first(q, sizes.padded_q, call.values)
    return Inputs(q, keys(k, padded_dim(k.shape[3], call.values)), own)


def _specs(inputs: Inputs, pages: Pages | None) -> Inputs:
    def keys(x: jax.Array) -> Any:
        if pages is None:
            return whole(x, head_axis=1)
        shape = x.shape[0], None, *x.shape[2:]
        return pl.BlockSpec(shape, lambda row, head, batch: (0, head, 0, 0))

    q, k, v = inputs
    own: Any = None if v is None else keys(v)
    return Inputs(whole(q), keys(k), own)


def _of_entry(table: jax.Array) -> pl.BlockSpec:
    """The pages of a program's batch entry."""
    return pl.BlockSpec((None, table.shape[1]), lambda row, head, batch: (batch, 0))
