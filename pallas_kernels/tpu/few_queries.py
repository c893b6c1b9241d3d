"""Attention of few queries over a long cache, on TPUs, by the forward kernel.

All rows of a key head are one block, which need not fill the lanes. A TPU has one or
two cores, which take the key heads in turn, so keys are not split.
"""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp

from pallas_kernels import bits
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Outputs, Vectors
from pallas_kernels.config import Tile, even_block
from pallas_kernels.pages import FewSizes, Pages
from pallas_kernels.tpu import operands
from pallas_kernels.tpu.batching import foldable
from pallas_kernels.tpu.forward import forward_rows
from pallas_kernels.tpu.runs import LANES, SUBLANES, plan_of_rows

# The most rows of one block, and keys of a block.
ROWS = KEYS = 512


def default_tile(sizes: FewSizes, dtype: Any) -> Tile:
    """All rows in one block if it holds them, and a block of keys that divides pages.

    Raises:
      ValueError: a page is no multiple of LANES.
    """
    wide = sizes.head_dim > 128 and jnp.dtype(dtype) != jnp.bfloat16
    most = KEYS // 2 if wide else KEYS
    rows = even_block(ROWS, sizes.rows, SUBLANES if sizes.rows <= ROWS else LANES)
    if sizes.page_size is None:
        return Tile(block_q=rows, block_kv=even_block(most, sizes.slots, LANES))
    if sizes.page_size % LANES:
        raise ValueError(
            f"page_size={sizes.page_size}: impl='tpu' needs pages of a multiple of "
            f"{LANES} keys"
        )
    return Tile(block_q=rows, block_kv=math.gcd(sizes.page_size, most))


def attend(
    inputs: Inputs, vectors: Vectors, mask: BlockMask, call: Call, pages: Pages | None
) -> Outputs:
    """Attention over the blocks of ``mask``; ``k`` and ``v`` may be paged.

    Raises:
      ValueError: a block size that the chip does not support.
    """
    rows, dtype = inputs.q.shape[2], inputs.q.dtype
    plan = plan_of_rows(mask, call)
    bits.check(vectors.bits, (mask.block_q, mask.block_kv))
    vectors = operands.with_batch_and_heads(vectors)
    run = partial(forward_rows, call=call, pages=pages)
    # The rule for vmap folds batches, which an array of pages has not.
    run = run if pages is not None else foldable(run)
    o, lse, _ = (x[:, :, :rows] for x in run(operands.prepared(inputs), vectors, plan))
    return Outputs(o.astype(dtype), lse)
