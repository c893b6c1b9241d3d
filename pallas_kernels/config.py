"""``KernelConfig``: block sizes and pipelining, which do not change the result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The block sizes and the pipelining of one kernel."""

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "num_warps", "num_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Options of a kernel launch; ``None`` means "choose for me".

    ``block_q`` and ``block_kv`` apply to the forward kernel and to both backward
    kernels, unless ``dq`` or ``dkv`` gives a tile. A TPU has one backward kernel, with
    the tile ``dkv``. Only GPUs use ``num_warps`` and
    ``num_stages``. A size of None depends on the lengths of the call: no block is much
    longer than its sequence. ``relayout=False`` keeps the given order of positions.
    Otherwise the compiler chooses another order if that visits enough fewer blocks.
    ``lists=True`` runs choices of cells by lists where that is possible, and False
    never does; by default, counts decide. ``residual_name`` names the output and the
    lse that the gradient reads, for policies such as ``jax.checkpoint_policies.
    save_only_these_names``; "attn_out" and "attn_lse" name them in any case.
    """

    block_q: int | None = None
    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    dq: Tile | None = None
    dkv: Tile | None = None
    relayout: bool | None = None
    lists: bool | None = None
    residual_name: str | None = None

    def resolve(self, defaults: "Tiles") -> "Tiles":
        """The tiles of this config, with ``defaults`` for each option that is None."""
        named = {
            name: value
            for name in ("block_q", "block_kv", "num_warps", "num_stages")
            if (value := getattr(self, name)) is not None
        }
        return Tiles(
            forward=replace(defaults.forward, **named),
            dq=self.dq or replace(defaults.dq, **named),
            dkv=self.dkv or replace(defaults.dkv, **named),
        )


class TileCounts(NamedTuple):
    """The blocks that a call visits, over all heads with a map of their own."""

    full: int
    partial: int
    q_rows: int  # rows of query blocks
    kv_rows: int  # rows of key blocks


# counter(block_q, block_kv): the blocks of that size that a call visits.
TileCounter = Callable[[int, int], TileCounts]


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels: forward, dq, and dkv (both dk and dv)."""

    forward: Tile
    dq: Tile
    dkv: Tile

    def with_block_kv(self, block_kv: int) -> "Tiles":
        """The same tiles with this ``block_kv`` in all three."""
        return self._each(lambda tile: replace(tile, block_kv=block_kv))

    def fitted(
        self, lengths: tuple[int, int], fit: Callable[[int, int], int]
    ) -> "Tiles":
        """The same tiles fitted to ``lengths``, those of queries and keys.

        ``fit(block, length)`` returns the size that replaces ``block``.
        """
        q_seq_len, kv_seq_len = lengths

        def fitted(tile: Tile) -> Tile:
            return replace(
                tile,
                block_q=fit(tile.block_q, q_seq_len),
                block_kv=fit(tile.block_kv, kv_seq_len),
            )

        return self._each(fitted)

    def _each(self, change: Callable[[Tile], Tile]) -> "Tiles":
        return Tiles(*map(change, (self.forward, self.dq, self.dkv)))


def even_block(block: int, length: int, multiple: int) -> int:
    """The size at which equal blocks cover ``length``, as few as with size ``block``.

    The size is ``length / ceil(length / block)``, rounded up to a multiple of
    ``multiple``. So the padding is less than ``multiple`` positions per block.
    """
    length = max(length, 1)
    even = -(-length // -(-length // block))
    return -(-even // multiple) * multiple
