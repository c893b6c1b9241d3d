"""Finds key blocks by a tree search: hierarchically pruned attention (HiP).

Lee et al., A training-free sub-quadratic cost transformer model serving framework with
hierarchically pruned attention, 2024, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32
from typing_extensions import override

from pallas_kernels.loops import repeat
from pallas_kernels.varying import vary
from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection


class Roots(NamedTuple):
    """The nodes from which the search of each block of queries starts."""

    # NumPy arrays with a row for each block of queries; or traced, for one of them.
    stop: Any  # [rows] the number of keys before the sliding window
    num_blocks: Any  # [rows] the number of key blocks that hold them
    first: Any  # [rows, slots] the first key block of each node
    size: Any  # [rows, slots] the number of key blocks of each node


@dataclass(frozen=True, repr=False)
class Descent(NamedSelection):
    """Key blocks found by a tree search; made by ``descent``."""

    # The queries of a block share the keys that are found.
    leak: ClassVar[Leak] = "block"

    mask_k: int = 512
    block_q: int = 32
    block_kv: int = 2
    sliding_window: int = 256
    sinks: int = 0
    by_row: bool = False

    def __post_init__(self) -> None:
        at_least("descent", "mask_k", self.mask_k, 1)
        at_least("descent", "block_q", self.block_q, 1)
        at_least("descent", "block_kv", self.block_kv, 1)
        at_least("descent", "sliding_window", self.sliding_window, 0)
        at_least("descent", "sinks", self.sinks, 0)

    @property
    def num_slots(self) -> int:
        """The number of nodes that are kept at each stage."""
        return -(-self.mask_k // self.block_kv)

    def roots(self, q_seq_len: int, kv_seq_len: int, q_offset: int) -> Roots:
        """The nodes of each query block before the first stage."""
        rows = np.arange(-(-q_seq_len // self.block_q))
        end = q_offset + np.minimum((rows + 1) * self.block_q, q_seq_len)
        stop = np.maximum(np.minimum(end, kv_seq_len) - self.sliding_window, 0)
        blocks = -(-stop // self.block_kv)
        edge = np.arange(self.num_slots + 1) * blocks[:, None] // self.num_slots
        return Roots(stop, blocks, edge[:, :-1], np.diff(edge))

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Searches the tree of each query block, a stage at a time.

        Parts: ``chosen``, bools ``[batch, heads, query blocks, key blocks]``, and
        ``stop``, int32 ``[1, queries]``: the keys before the window. Query blocks count
        from the first query. Memory: the result, and the keys that one query block
        scores in a stage.
        """
        _, _, length, _ = content.q.shape
        num_keys = content.k.shape[2]
        roots = self.roots(length, num_keys, content.q_offset)
        spare = len(roots.stop) * self.block_q - length
        q = jnp.pad(content.queries(), ((0, 0), (0, 0), (0, spare), (0, 0)))
        k = content.keys()
        # Every head of every batch entry has its own search; query blocks take turns.
        by_head = jax.vmap(self._descend, (0, 0, None, None))
        by_batch = jax.vmap(by_head, (0, 0, None, None))

        def of_row(args: tuple) -> Array:
            row, one = args
            start = row * self.block_q
            mine = jax.lax.dynamic_slice_in_dim(q, start, self.block_q, axis=2)
            rows = jnp.minimum(self.block_q, length - start)
            return by_batch(mine, k, self._sampled(rows), one)

        one = Roots(*(jnp.asarray(x, jnp.int32) for x in roots))
        chosen = jax.lax.map(of_row, (jnp.arange(len(roots.stop)), one))
        stop = np.repeat(roots.stop, self.block_q)[None, :length]
        parts = {"chosen": jnp.moveaxis(chosen, 0, 2)}
        return parts | {"stop": jnp.asarray(stop, jnp.int32)}

    def _sampled(self, rows: Array) -> Bool[Array, " block_q"]:
        """The odd rows of a query block, or its only row."""
        row = jnp.arange(self.block_q)
        return (row < rows) & ((row % 2 == 1) | (rows == 1))

    def _descend(self, q: Array, k: Array, sampled: Array, one: Roots) -> Array:
        """The key blocks that one query block of one head finds, ``[key blocks]``."""
        num_blocks = max(1, -(-k.shape[0] // self.block_kv))
        # As many stages as the longest row needs; shorter rows stop changing earlier.
        stages = 0
        while self.num_slots << stages < num_blocks:
            stages += 1

        def stage(t: Array, nodes: tuple[Array, Array]) -> tuple[Array, Array]:
            split = self._stage(q, k, sampled, nodes)
            goes_on = one.num_blocks > self.num_slots * jnp.left_shift(1, t)
            first, size = (
                jnp.where(goes_on, *x) for x in zip(split, nodes, strict=True)
            )
            return first, size

        start = vary((one.first, one.size), q, k, one)
        first, size = repeat(stages, stage, start)
        at = jnp.where(size > 0, first, num_blocks)
        found = jnp.zeros(num_blocks, bool).at[at].set(True, mode="drop")
        everything = jnp.arange(num_blocks) < one.num_blocks
        return jnp.where(one.stop <= self.mask_k, everything, found)

    def _stage(
        self, q: Array, k: Array, sampled: Array, nodes: tuple[Array, Array]
    ) -> tuple[Int32[Array, " slots"], Int32[Array, " slots"]]:
        """Splits each node in two and keeps the better half, in order of position."""
        first, size = nodes
        middle = size // 2
        first = jnp.stack([first, first + middle], axis=-1).reshape(-1)
        size = jnp.stack([middle, size - middle], axis=-1).reshape(-1)
        at = first[:, None] * self.block_kv + jnp.arange(self.block_kv)[None, :]
        logits = jnp.einsum("qd,nbd->nbq", q, k[jnp.clip(at, 0, k.shape[0] - 1)])
        held = (at < k.shape[0])[..., None] & sampled[None, None, :]
        held &= (size > 0)[:, None, None] & jnp.isfinite(logits)
        score = jnp.max(logits, axis=(1, 2), initial=-jnp.inf, where=held)
        # Ties go to the lower index. The nodes stay in order for the next stage.
        kept = jnp.sort(jax.lax.top_k(score, self.num_slots)[1])
        return first[kept], jnp.where(score[kept] > -jnp.inf, size[kept], 0)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        found = self.part("chosen")[h, q // self.block_q, k // self.block_kv] == 1
        seen = found | (k >= self.part("stop")[q]) | (k < self.sinks)
        if self.by_row:
            seen |= q - k < self.sliding_window
        return (k <= q) & seen


def descent(
    mask_k: int = 512,
    *,
    block_q: int = 32,
    block_kv: int = 2,
    sliding_window: int = 256,
    sinks: int = 0,
    by_row: bool = False,
) -> Descent:
    """A block of queries sees ``mask_k`` keys that a tree search finds, and a window.

    Lee et al., HiP attention, 2024, section 3, in the form of the first released code.
    The key blocks before the window are divided into ``mask_k / block_kv`` nodes. While
    nodes hold more than one block, each is split in two and the better half of them is
    kept. The score of a node is the largest product of a key of its first block with an
    odd row of the query block (or with its only row). The search is greedy: it may miss
    the best keys.

    The table of chosen blocks takes ``q_seq_len * kv_seq_len / (block_q * block_kv)``
    bytes a head, its bits ``q_seq_len * kv_seq_len / (8 * block_kv)``.

    Args:
      mask_k: the number of keys that are found for each query block.
      block_q: queries in a block.
      block_kv: keys in a block.
      sliding_window: keys of the window, which ends with the query block.
      sinks: how many of the first keys every query sees.
      by_row: also let each query see the ``sliding_window`` keys up to itself.

    Raises:
      ValueError: a size is too small.

    Example:
      >>> from sadsl.selections import descent
      >>> spec = descent(2, block_q=2, block_kv=1, sliding_window=2)
      >>> parts = {"chosen": [[[0, 0, 0, 0], [1, 0, 0, 0]]], "stop": [0, 0, 2, 2]}
      >>> operands = {spec.key(name): part for name, part in parts.items()}
      >>> print(spec.dense(4, operands=operands)[0].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 0 1 0]
       [1 0 1 1]]
    """
    return Descent(mask_k, block_q, block_kv, sliding_window, sinks, by_row)
