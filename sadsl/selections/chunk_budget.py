"""Selects chunks of keys of any length, up to a budget of tokens (DHSA).

Xiong et al., Long-context modeling with dynamic hierarchical sparse attention for
on-device LLMs, 2025, section 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped
from typing_extensions import override

from lowering.problem import Problem
from lowering.run_time.packed import PackedBools, words_of
from pallas_kernels.call import WORD
from pallas_kernels.lists.call import held
from sadsl.maps.base import at_least
from sadsl.maps.symbols import POSITIONS, Symbol, Truth
from sadsl.selections.base import Content, Leak, ListShape, NamedSelection
from sadsl.selections.listing import first_set, pack

# The number of keys.
N = POSITIONS["n"]
FLAGS = "integers or bools [batch or 1, keys], not 0 where a chunk begins"


class ChunkRanges(NamedTuple):
    """The chunks of one batch entry: keys ``start <= k < stop``; unused are empty."""

    start: Int32[Array, " chunks"]
    stop: Int32[Array, " chunks"]


@dataclass(frozen=True, repr=False)
class ChunkBudget(NamedSelection):
    """Whole chunks by rank, within a budget of keys; made by ``chunk_budget``."""

    leak: ClassVar[Leak] = "all"

    budget: int
    block: int = 128
    first: int = 128
    local: int = 64
    last: int = 64
    max_chunks: int | None = None
    by_block: bool = False

    def __post_init__(self) -> None:
        for name in ("budget", "first", "local", "last"):
            at_least("chunk_budget", name, getattr(self, name), 0)
        at_least("chunk_budget", "block", self.block, 1)
        if self.max_chunks is not None:
            at_least("chunk_budget", "max_chunks", self.max_chunks, 1)

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {"boundaries": 1}

    @property
    def rows(self) -> int:
        """The number of queries that share a choice."""
        return self.block if self.by_block else 1

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Chooses ``chosen``, bools ``[batch, queries or query blocks, keys]``.

        Memory: a block of queries times the chunks, and the result.
        """
        return {"chosen": self._by_blocks(content, lambda chosen: chosen)}

    @override
    def choose_packed(self, content: Content) -> Mapping[str, Array | PackedBools]:
        words = self._by_blocks(content, words_of)
        return {"chosen": PackedBools(words, content.k.shape[2])}

    @override
    def list_shape(self, problem: Problem) -> ListShape:
        """Lists of the keys that take part of the budget, without the ``first``."""
        num_keys = problem.kv_seq_len
        size = self.budget - self.first
        beyond = problem.q_offset + problem.q_seq_len > num_keys
        if not self.by_block and not beyond:
            size -= self.local
        least = self.local if self.by_block else 0
        size = min(max(size, least, 1), num_keys)
        return ListShape(size, self.rows, 1, "shared")

    @override
    def choose_lists(self, content: Content) -> Int[Array, "batch groups rows size"]:
        lengths = content.q.shape[2], content.k.shape[2]
        problem = Problem(*lengths, content.q.shape[1], content.q_offset)
        size = self.list_shape(problem).size

        def of_rows(chosen: Array) -> Array:
            wide = jnp.pad(chosen, ((0, 0), (0, -chosen.shape[1] % WORD)))
            return jnp.minimum(first_set(pack(wide), size), chosen.shape[1])

        return self._by_blocks(jax.lax.stop_gradient(content), of_rows)[:, None]

    @override
    def chosen_by(
        self, listed: Int[Array, "batch groups rows size"], problem: Problem
    ) -> Mapping[str, Array]:
        return {"chosen": held(listed, problem.kv_seq_len)[:, 0]}

    def _by_blocks(
        self, content: Content, kept: Callable[[Array], Array]
    ) -> Shaped[Array, "batch rows _"]:
        """``kept(chosen)`` of the rows of each block in turn, side by side.

        ``chosen`` are bools ``[rows, keys]``.
        """
        batch, _, length, _ = content.q.shape
        num_keys = content.k.shape[2]
        flags = content.operand("boundaries", FLAGS)
        if flags.shape[-1] != num_keys:
            raise ValueError(
                f"operand 'boundaries' has {flags.shape[-1]} entries for {num_keys} "
                f"keys: pass {FLAGS}"
            )
        flags = jnp.broadcast_to(flags.astype(bool), (batch, num_keys))
        num_chunks = min(self.max_chunks or num_keys, num_keys)
        spare = -length % self.block
        q = jnp.pad(content.queries().mean(axis=1), ((0, 0), (0, spare), (0, 0)))
        q = q.reshape(batch, -1, self.block, q.shape[-1])
        row = jnp.arange(length + spare).reshape(-1, self.block)
        k = content.k.astype(jnp.float32).mean(axis=1)
        # The padding of a short last block is 0 and adds nothing to its sum.
        count = jnp.sum(row < length, axis=1, keepdims=True).astype(jnp.float32)

        def of_entry(q: Array, k: Array, flags: Array) -> Array:
            chunk = jnp.minimum(jnp.cumsum(flags.at[0].set(True)), num_chunks) - 1
            every = jnp.arange(num_chunks)
            ranges = ChunkRanges(
                jnp.searchsorted(chunk, every, side="left").astype(jnp.int32),
                jnp.searchsorted(chunk, every, side="right").astype(jnp.int32),
            )
            pooled = pool(k, ranges, chunk)

            def of_block(args: tuple[Array, Array]) -> Array:
                mean, row = args
                scores = pooled @ mean
                scores = jnp.where(ranges.stop > ranges.start, scores, jnp.nan)
                position = content.q_offset + row
                if self.by_block:
                    last = content.q_offset + jnp.minimum(row[-1] + 1, length)
                    position = (last - 1)[None]
                return kept(self._block(scores, position, ranges, chunk))

            found = jax.lax.map(of_block, (q.sum(axis=1) / jnp.sqrt(count), row))
            return found.reshape(-1, found.shape[-1])[: -(-length // self.rows)]

        return jax.vmap(of_entry)(q, k, flags)

    def _block(
        self,
        scores: Float[Array, " chunks"],
        position: Int32[Array, " rows"],
        ranges: ChunkRanges,
        chunk: Int32[Array, " keys"],
    ) -> Bool[Array, "rows keys"]:
        """Whole chunks by rank, and a part of the next one, in a block of queries.

        ``position`` is the last position that the queries of a row may see.
        """
        num_chunks, num_keys = len(scores), len(chunk)
        valid = jnp.isfinite(scores)
        order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
        rank = jnp.zeros(num_chunks, jnp.int32).at[order].set(jnp.arange(num_chunks))
        rank = jnp.where(valid, rank, num_chunks)
        frontier = position + 1
        end = jnp.minimum(frontier, num_keys)
        near = jnp.clip(frontier - self.local, 0, end)
        forced = jnp.minimum(self.first, near) + (end - near)
        room = jnp.maximum(self.budget - forced, 0)
        # The keys of each chunk that compete, by rank: [rows, chunks].
        low = jnp.maximum(ranges.start[order], self.first)[None]
        high = jnp.minimum(ranges.stop[order][None], near[:, None])
        count = jnp.where(valid[order][None], jnp.maximum(high - low, 0), 0)
        total = jnp.cumsum(count, axis=1)
        limit = jnp.sum(total <= room[:, None], axis=1)
        at = jnp.minimum(limit, num_chunks - 1)
        before = jnp.take_along_axis(total - count, at[:, None], axis=1)[:, 0]
        part = jnp.where(limit < num_chunks, room - before, 0)
        start = jnp.broadcast_to(low, count.shape)
        start = jnp.take_along_axis(start, at[:, None], axis=1)[:, 0]
        key = jnp.arange(num_keys)[None]
        limit, start, part, near, end = (
            x[:, None] for x in (limit, start, part, near, end)
        )
        chosen = rank[chunk][None] < limit
        chosen |= (key >= start) & (key < start + part)
        # Chunks that are not finite have the rank num_chunks and no key that competes.
        chosen &= (key >= self.first) & (key < near) & (rank[chunk] < num_chunks)[None]
        return chosen | (key >= near) & (key < end) if self.by_block else chosen

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        seen = self.part("chosen")[q // self.rows, k] == 1
        # Alone, a query has its nearest keys whatever is chosen.
        seen = seen if self.by_block else seen | (q - k < self.local)
        return (k <= q) & (seen | (k < self.first) | (q >= N - self.last))


def pool(
    k: Float[Array, "keys head_dim"], ranges: ChunkRanges, chunk: Int32[Array, " keys"]
) -> Float[Array, "chunks head_dim"]:
    """The mean of each chunk times the square root of its length; 0 if it is empty."""
    total = jax.ops.segment_sum(k, chunk, num_segments=len(ranges.start))
    size = jnp.maximum(ranges.stop - ranges.start, 1).astype(jnp.float32)
    return total / jnp.sqrt(size)[:, None]


def chunk_budget(
    budget: int,
    *,
    block: int = 128,
    first: int = 128,
    local: int = 64,
    last: int = 64,
    max_chunks: int | None = None,
    by_block: bool = False,
) -> ChunkBudget:
    """A query sees ``budget`` keys: those of the chunks that its block ranks highest.

    Xiong et al., DHSA, 2025, section 3. The call needs the operand ``boundaries``,
    integers or bools ``[keys]`` that are not 0 where a chunk begins;
    ``teacher_boundaries`` or a trained predictor finds them. A chunk is represented by
    the mean of its keys over tokens and heads, times the square root of its length; so
    is a block of queries. The products of the two rank the chunks, for all heads alike.
    The ``first`` and the ``local`` keys are always seen and count in the budget. Then
    come whole chunks by rank, and the first keys of the next chunk while the budget
    lasts.

    For all heads, lists take ``4 * budget`` bytes a query, and bits ``kv_seq_len / 8``
    (``KernelConfig(lists=...)``); with ``by_block``, a block takes as much.

    Args:
      budget: keys that a query sees.
      block: queries in a block.
      first: keys at the start of the sequence that every query sees.
      local: last keys up to the query that it sees.
      last: how many of the last positions see every key.
      max_chunks: chunks past this number become part of the last one, which saves
        memory; None does not limit them.
      by_block: count the budget and the ``local`` keys from the end of the query block,
        as the authors' code does.

    Raises:
      ValueError: a size is too small; in a call, ``boundaries`` is missing or not of
        the length of the keys.

    Example:
      >>> from sadsl.selections import chunk_budget
      >>> spec = chunk_budget(2048, max_chunks=512)
      >>> spec
      chunk_budget(2048, max_chunks=512)
      >>> spec.operands  # the number of axes of each
      {'boundaries': 1}
    """
    return ChunkBudget(budget, block, first, local, last, max_chunks, by_block)
