"""Paged caches: the keys of all sequences of a batch lie in pages of one pool.

A pool is an array ``[num_pages, kv_heads, page_size, dim]``. A sequence takes a page
when it gets the first token of it, so a batch of short sequences needs few pages. All
of it happens on arrays, inside of ``jit`` too. A free page is zero, so no NaN of a
sequence that has ended reaches the next one.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sadsl.decode.slots import CacheSlots
from sadsl.maps.base import at_least


class Paging(NamedTuple):
    """What a caller asks of a paged cache; ``num_pages`` None: enough for the batch."""

    page_size: int
    num_pages: int | None

    def fitted(self, slots: CacheSlots) -> tuple[CacheSlots, "Paging | None"]:
        """The slots of whole pages for all tokens, or a ring and None.

        A ring of at most half of the tokens stays: it needs no table, and sequences
        longer than it would need more pages. That of a map such as ``strided`` is
        nearly as long as the cache.
        """
        if 2 * slots.size <= slots.length:
            return slots, None
        count = -(-slots.length // self.page_size)
        return CacheSlots(0, count * self.page_size, slots.length), self

    def table(self, batch: int, slots: CacheSlots) -> "PageTable":
        """The table before the first token, as NumPy arrays.

        Then a call knows that its tokens find pages, even inside of ``jit``.
        """
        columns = slots.size // self.page_size
        count = batch * columns if self.num_pages is None else self.num_pages
        table = np.full((batch, columns), -1, np.int32)
        free = np.arange(count, dtype=np.int32)[::-1].copy()
        arrays = (table, free, np.asarray(count, np.int32))
        return PageTable(*cast(Any, arrays), size=self.page_size)


def paging_of(page_size: int | None, num_pages: int | None) -> Paging | None:
    """The checked wish for pages, or None.

    Raises:
      ValueError: a size is below 1, or there are pages without a size.
    """
    if page_size is None:
        if num_pages is not None:
            raise ValueError(
                f"init_cache: num_pages={num_pages} without page_size: pass the "
                "number of tokens of a page too"
            )
        return None
    at_least("init_cache", "page_size", page_size, 1)
    if num_pages is not None:
        at_least("init_cache", "num_pages", num_pages, 1)
    return Paging(page_size, num_pages)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageTable:
    """Which pages of a pool the sequences of a batch hold, and which are free.

    Attributes:
      table: page ``table[b, j]`` holds the tokens from ``j * size`` on of sequence
        ``b``; -1 stands for no page. The pages of a sequence are its first columns.
      free: the first ``left`` entries are the free pages; the last of them goes first.
      left: how many pages are free.
      size: the tokens of a page.
    """

    table: Int[Array, "batch columns"]
    free: Int[Array, " num_pages"]
    left: Int[Array, ""]
    size: int = field(metadata={"static": True})

    def pages_of(self, length: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """How many pages so many tokens need."""
        return jnp.minimum(-(-length // self.size), self.table.shape[1])

    def complete(self, length: Int[Array, "*batch"]) -> Bool[Array, " batch"]:
        """Whether each sequence holds the pages of its tokens.

        A sequence that once found no page misses those tokens, until its release.
        """
        held = jnp.sum(jnp.asarray(self.table) >= 0, axis=1, dtype=jnp.int32)
        return held >= self.pages_of(length)


def check_room(pages: PageTable, count: Any, valid: Any) -> None:
    """Checks that new tokens find pages, if all numbers are known.

    Raises:
      ValueError: they do not.
    """
    numbers = (pages.table, pages.left, count, valid)
    if any(isinstance(x, jax.core.Tracer) for x in numbers):
        return
    table, left, count, valid = map(np.asarray, numbers)
    before, after = (
        np.minimum(-(-x // pages.size), table.shape[1]) for x in (count, count + valid)
    )
    complete = (table >= 0).sum(axis=1) >= before
    wanted = int(np.where(complete, after - before, 0).sum())
    if wanted > left:
        raise ValueError(
            f"the new tokens begin {wanted} pages of {pages.size}, and {left} of the "
            f"{len(pages.free)} are free: release a sequence that has ended, or "
            "pass a larger num_pages to init_cache"
        )


def taken(
    pages: PageTable, count: Int[Array, " batch"], valid: Int[Array, " batch"], new: int
) -> PageTable:
    """The table after ``new`` tokens of each sequence, of which ``valid`` exist.

    Sequences take the pages that they begin in the order of the batch, all or none. One
    that finds too few takes none, nor do later ones in this call.
    """
    columns = pages.table.shape[1]
    before, after = pages.pages_of(count), pages.pages_of(count + valid)
    wanted = jnp.where(pages.complete(count), after - before, 0)
    served = jnp.cumsum(wanted, dtype=jnp.int32) <= pages.left
    wanted = jnp.where(served, wanted, 0)
    until = jnp.cumsum(wanted, dtype=jnp.int32)
    index = jnp.arange(-(-new // pages.size), dtype=jnp.int32)[None]
    own = index < wanted[:, None]
    place = pages.left - 1 - (until - wanted)[:, None] - index
    page = jnp.take(jnp.asarray(pages.free), place, mode="clip")
    column = jnp.where(own, before[:, None] + index, columns)
    row = jnp.arange(len(wanted), dtype=jnp.int32)[:, None]
    table = jnp.asarray(pages.table).at[row, column].set(page, mode="drop")
    return replace(pages, table=table, left=pages.left - until[-1])


def returned(pages: PageTable, ended: Bool[Array, " batch"]) -> PageTable:
    """The table after some sequences gave all their pages back."""
    table, free = jnp.asarray(pages.table), jnp.asarray(pages.free)
    back = (ended[:, None] & (table >= 0)).ravel()
    rank = jnp.cumsum(back, dtype=jnp.int32)
    place = jnp.where(back, pages.left + rank - 1, len(free))
    return replace(
        pages,
        table=jnp.where(ended[:, None], -1, table),
        free=free.at[place].set(table.ravel(), mode="drop"),
        left=jnp.asarray(pages.left + rank[-1], jnp.int32),
    )


def held_by(pages: PageTable, some: Bool[Array, " batch"]) -> Bool[Array, " num_pages"]:
    """Whether one of some sequences holds each page."""
    count = len(pages.free)
    own = jnp.where(some[:, None] & (pages.table >= 0), pages.table, count)
    return jnp.zeros(count, bool).at[own.ravel()].set(True, mode="drop")


def put(
    pool: Float[Array, "num_pages heads page_size dim"],
    x: Float[Array, "batch heads new dim"],
    pages: PageTable,
    count: Int[Array, " batch"],
    valid: Int[Array, " batch"],
) -> Float[Array, "num_pages heads page_size dim"]:
    """The pool with new tokens, each in the page of its sequence; see ``taken``.

    Tokens without a page are dropped: their sequence is no longer ``complete``.
    """
    columns = pages.table.shape[1]
    index = jnp.arange(x.shape[2], dtype=jnp.int32)[None]
    position = count[:, None] + index
    column = position // pages.size
    page = jnp.take_along_axis(
        jnp.asarray(pages.table), jnp.minimum(column, columns - 1), axis=1
    )
    there = (index < valid[:, None]) & (column < columns) & (page >= 0)
    page = jnp.where(there, page, len(pool))
    rows = jnp.swapaxes(x, 1, 2).astype(pool.dtype)
    return pool.at[page, :, position % pages.size].set(rows, mode="drop")


def gathered(
    pool: Float[Array, "num_pages heads page_size dim"], pages: PageTable
) -> Float[Array, "batch heads slots dim"]:
    """The tokens of each sequence side by side; zero where it has no page."""
    table = jnp.asarray(pages.table)
    rows = jnp.take(
        pool, jnp.where(table < 0, len(pool), table), axis=0, mode="fill", fill_value=0
    )
    batch, columns, heads, size, dim = rows.shape
    return jnp.swapaxes(rows, 1, 2).reshape(batch, heads, columns * size, dim)
