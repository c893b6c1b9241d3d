"""Attention of few queries over a long cache, on a chosen backend.

Decoding has one to about sixteen queries, which are rows of one query block. Each key
block of the plan is read once, from ``[batch, kv_heads, slots, dim]`` or from a page.
"""

import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Call, Inputs, Outputs, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.pages import Pages
from pallas_kernels.xla import few_queries as xla

# The keys of a block on CPUs: each step of the loop has a fixed cost.
KEYS = 512


class Sizes(NamedTuple):
    """The sizes of a call with few queries."""

    rows: int
    slots: int
    head_dim: int
    page_size: int | None


def default_tile(sizes: Sizes, impl: str, dtype: Any) -> Tile:
    """The block sizes: all rows in one block, and no block in two pages."""
    del impl, dtype
    return Tile(block_q=sizes.rows, block_kv=_even(sizes.page_size or sizes.slots))


def _even(length: int) -> int:
    """The block of up to ``KEYS`` keys that divides ``length``, if one is not small."""
    if length <= KEYS:
        return length
    divisor = math.gcd(length, KEYS)
    return divisor if divisor >= 128 else KEYS


def attend(
    inputs: Inputs, vectors: Vectors, mask: BlockMask, call: Call, *,
    impl: str, pages: Pages | None,
) -> Outputs:  # fmt: skip
    """Outputs and lse of ``q [batch, kv_heads, rows, dim]``, without a gradient.

    ``k`` and ``v`` are ``[batch, kv_heads, slots, dim]``, or ``[pages, kv_heads, size,
    dim]`` with ``pages``.
    """
    del impl
    return xla.attend(inputs, vectors, mask, call, pages)
