"""Runs calls whose batch size is a symbol (``jax.export``), one entry at a time.

Run-time plans, selections and Pallas kernels need a known batch size. The batch of one
entry has a known size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The backends whose kernels need known sizes.
KNOWN_SIZES = "tpu", "triton"


def is_symbolic(x: Any) -> bool:
    """Whether the batch, the first axis, has no known size."""
    return not isinstance(x.shape[0], int)


def entry_by_entry(run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)``, computed in a loop over the entries of the batch.

    Each iteration gets one entry of the arrays whose first axis is symbolic; the other
    arrays are passed whole. The results of ``run`` must have a batch axis.
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
