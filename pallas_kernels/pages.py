"""A paged cache: the keys of a sequence lie in pages, in any order."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


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
        """Whether each key block lies in a page; ``block_kv`` divides ``size``."""
        return jnp.repeat(self.table >= 0, self.size // block_kv, axis=1)

    def place(self, block: Any, block_kv: int) -> tuple[Any, Any]:
        """The column of ``table`` for a key block, and its first row in the page."""
        per_page = jnp.int32(self.size // block_kv)
        return jax.lax.div(block, per_page), jax.lax.rem(block, per_page) * block_kv
