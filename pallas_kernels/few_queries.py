"""Attention of few queries over a long cache, on a chosen backend.

Decoding has one to about sixteen queries, which are rows of one query block. Each key
block of the plan is read once, from ``[batch, kv_heads, slots, dim]`` or from a page.
"""

from typing import Any

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Outputs, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.pages import FewSizes, Pages
from pallas_kernels.tpu import few_queries as tpu
from pallas_kernels.triton import few_queries as triton
from pallas_kernels.xla import few_queries as xla

BACKENDS: dict[str, Any] = {"xla": xla, "tpu": tpu, "triton": triton}


def default_tile(sizes: FewSizes, impl: str, dtype: Any) -> Tile:
    """The block sizes: as many rows as fit one block, and no block in two pages.

    Raises:
      ValueError: a page is smaller than the blocks of the backend.
    """
    return BACKENDS[impl].default_tile(sizes, dtype)


def attend(
    inputs: Inputs, vectors: Vectors, mask: BlockMask, call: Call, *,
    impl: str, pages: Pages | None,
) -> Outputs:  # fmt: skip
    """Outputs and lse of ``q [batch, kv_heads, rows, dim]``, without a gradient.

    ``k`` and ``v`` are ``[batch, kv_heads, slots, dim]``, or ``[pages, kv_heads, size,
    dim]`` with ``pages``.

    Raises:
      ValueError: a block size that the backend does not support.
    """
    return BACKENDS[impl].attend(inputs, vectors, mask, call, pages)
