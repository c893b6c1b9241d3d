"""The arguments of attention by lists: the contract of its backends.

A *row* is ``block_q`` queries that share one list. A list holds blocks of ``block_kv``
keys. Query heads that share a list are a *group*; heads of a group that also share a
key head are rows of one product, so a key is loaded once for all of them.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.call import Predicate
from pallas_kernels.softmax import LOG2_E


@dataclass(frozen=True)
class ListCall:
    """The static part of a call by lists.

    The arrays of a call are those of ``pallas_kernels.call`` and ``index``, int32
    ``[batch or 1, groups, rows, blocks]``: the blocks of each row. An entry outside of
    ``0 .. num_blocks - 1`` stands for no block. A list has no block twice. The number
    of groups divides that of query heads; it divides that of key heads, or is a
    multiple of it.

    ``predicate`` tests the pairs of the listed blocks; its vectors have one head.
    ``values`` and ``residual_name`` are those of ``pallas_kernels.call.Call``.
    """

    predicate: Predicate
    sm_scale: float
    block_q: int = 1
    block_kv: int = 1
    logits_soft_cap: float | None = None
    interpret: Hashable = False
    values: tuple[int, int] | None = None
    residual_name: str | None = None

    # Lists have no biases and no dropout.
    learned_scores = False
    unit = LOG2_E

    @property
    def scale(self) -> float:
        """The factor of ``q k^T``; see ``Call.scale``."""
        return self.sm_scale * self.unit


def num_blocks(length: int, block: int) -> int:
    """The number of blocks of a sequence; the last one may be shorter."""
    return -(-length // block)


def held(
    index: Int32[Array, "batch groups rows blocks"], blocks: int
) -> Bool[Array, "batch groups rows all_blocks"]:
    """Whether each block is in the list of each row, for ``blocks`` blocks.

    Example:
      >>> held(jnp.array([[[[0, 2, 3]]]]), 3).tolist()
      [[[[True, False, True]]]]
    """
    flat = index.reshape(-1, index.shape[-1])
    at = jnp.where((flat >= 0) & (flat < blocks), flat, blocks)
    rows = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    found = jnp.zeros((len(flat), blocks + 1), bool).at[rows, at].set(True)
    return found[:, :blocks].reshape(*index.shape[:-1], blocks)
