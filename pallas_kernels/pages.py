"""A paged cache: the keys of a sequence lie in pages, in any order."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


class FewSizes(NamedTuple):
    """The sizes of a call with few queries: rows, and keys with or without pages."""

    rows: int
    slots: int
    head_dim: int
    page_size: int | None

    @property
    def longest(self) -> int:
        """The most keys that lie side by side."""
        return self.page_size or self.slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """Where the keys of each batch entry lie in arrays ``[pages, heads, size, dim]``.

    Page ``table[b, j]`` holds the keys ``j * size`` to ``(j + 1) * size - 1`` of entry
    ``b``. A negative number stands for no page: those keys are never read.
    """

    table: Any  # int32 [batch, pages of a sequence]
    size: int = field(metadata={"static": True})

    def present(self, block_kv: int) -> Bool[Array, "batch blocks"]:
        """Whether each key block lies in a page.

        Raises:
          ValueError: ``block_kv`` does not divide ``size``.
        """
        if self.size % block_kv:
            raise ValueError(
                f"block_kv={block_kv} does not divide a page of {self.size} keys: name "
                "a divisor, or leave block_kv out"
            )
        return jnp.repeat(self.table >= 0, self.size // block_kv, axis=1)

    def place(self, block: Any, block_kv: int) -> tuple[Any, Any]:
        """The column of ``table`` for a key block, and its first row in the page."""
        return place_in_page(block, block_kv, self.size)


def place_in_page(block: Any, block_kv: int, page_size: int) -> tuple[Any, Any]:
    """The page of a sequence that holds a key block, and the block's first row in it.

    Example:
      >>> column, first = place_in_page(jnp.int32(5), 16, 64)
      >>> int(column), int(first)
      (1, 16)
    """
    per_page = jnp.int32(page_size // block_kv)
    return jax.lax.div(block, per_page), jax.lax.rem(block, per_page) * block_kv
