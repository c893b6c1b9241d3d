"""A batch whose size is a symbol, as ``jax.export`` has it: one entry after the other.

Plans made at run time, choices by content and Pallas kernels are made for a batch of a
known size. That of one entry is known.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The backends whose kernels need to know all sizes.
KNOWN_SIZES = "tpu", "triton"


def is_symbolic(x: Any) -> bool:
    """Whether the batch, the first axis, has no known size."""
    return not isinstance(x.shape[0], int)


def entry_by_entry(run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)``, whose results have a batch axis, in a loop over batch entries.

    Arrays whose first axis is symbolic have one entry each time; others are shared.
    """
    leaves, tree = jax.tree.flatten(args)
    many = [x.ndim > 0 and is_symbolic(x) for x in leaves]

    def of_entry(entries: list[jax.Array]) -> Any:
        own = iter(entries)
        each = [
            next(own)[None] if has_entries else x
            for x, has_entries in zip(leaves, many, strict=True)
        ]
        return run(*jax.tree.unflatten(tree, each))

    mapped = [x for x, has_entries in zip(leaves, many, strict=True) if has_entries]
    return jax.tree.map(lambda x: jnp.squeeze(x, 1), jax.lax.map(of_entry, mapped))
