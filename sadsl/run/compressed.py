"""Runs ``compressed``: attention to one key and one value for each block."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.run.attend import attend
from sadsl.run.over import over_entries
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.selections.attended import window_means
from sadsl.terms.compressed import Compressed


@attend.register
def _(
    term: Compressed, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Blocks are entries, made of the tokens.

    Raises:
      ValueError: a compressing function is missing, or returns another shape.
    """
    q, k, v = inputs
    short_k, short_v = (
        shortened(x, term, name, given) for x, name in ((k, term.key), (v, term.value))
    )
    return over_entries(term.blocks, (q, short_k, short_v), given, setting)


def shortened(
    x: Float[Array, "batch seq heads dim"],
    term: Compressed,
    name: str | None,
    given: Mapping[str, Any],
) -> Float[Array, "batch blocks heads dim"]:
    """One vector for each whole block of ``x``.

    The mean of the block if ``name`` is None, else the result of the operand ``name``.

    Raises:
      ValueError: the function was not given, or returns another shape.
      TypeError: the operand is not a function.
    """
    if not term.num_blocks(x.shape[1]):
        return x[:, :0]
    if name is None:
        return window_means(x, term.length, term.stride)
    start = np.arange(term.num_blocks(x.shape[1]))[:, None] * term.stride
    return pooled(x[:, start + np.arange(term.length)], term, name, given)


def pooled(
    blocks: Float[Array, "batch blocks length heads dim"],
    term: Compressed,
    name: str | None,
    given: Mapping[str, Any],
) -> Float[Array, "batch blocks heads dim"]:
    """One vector for each block of tokens; see ``shortened``.

    Raises:
      ValueError: the function was not given, or returns another shape.
      TypeError: the operand is not a function.
    """
    if name is None:
        return jnp.mean(widened(blocks), axis=2).astype(blocks.dtype)
    if name not in given:
        raise ValueError(
            f"{term!r} compresses by {name!r}, which was not given: pass "
            f"operands={{{name!r}: function}}, or modules= of a layer"
        )
    function: Callable[[Array], Array] = given[name]
    if not callable(function):
        raise TypeError(f"operand {name!r} of {term!r} must be a function of blocks")
    found = function(blocks)
    wanted = (*blocks.shape[:2], *blocks.shape[3:])
    if found.shape != wanted:
        raise ValueError(
            f"operand {name!r} returned shape {found.shape} for blocks of shape "
            f"{blocks.shape}: {term!r} needs one vector for each block and head, "
            f"{wanted}"
        )
    return found.astype(blocks.dtype)
