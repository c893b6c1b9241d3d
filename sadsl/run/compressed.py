"""Runs ``compressed``: attention to one key and one value for each block."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.precision import wide
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.selections.attended import window_means
from sadsl.terms.base import read_by
from sadsl.terms.compressed import Compressed


@attend.register
def _(
    term: Compressed, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Attention over the sequence of blocks, by the ordinary kernels.

    Raises:
      ValueError: a compressing function is missing, or returns another shape.
    """
    q, k, v = inputs
    batch, length, heads, _ = q.shape
    if not term.num_blocks(k.shape[1]):
        lse = jnp.full((batch, heads, length), -jnp.inf, wide(q.dtype))
        return Outcome(jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), lse)
    short_k, short_v = (
        shortened(x, term, name, given) for x, name in ((k, term.key), (v, term.value))
    )
    mine = read_by(term.blocks, given)
    return attend(term.blocks, (q, short_k, short_v), mine, setting)


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
    if name is None:
        return window_means(x, term.length, term.stride)
    if name not in given:
        raise ValueError(
            f"{term!r} compresses by {name!r}, which was not given: pass "
            f"operands={{{name!r}: function}}, or modules= of a layer"
        )
    function: Callable[[Array], Array] = given[name]
    if not callable(function):
        raise TypeError(f"operand {name!r} of {term!r} must be a function of blocks")
    start = np.arange(term.num_blocks(x.shape[1]))[:, None] * term.stride
    blocks = x[:, start + np.arange(term.length)]
    found = function(blocks)
    wanted = (*blocks.shape[:2], *x.shape[2:])
    if found.shape != wanted:
        raise ValueError(
            f"operand {name!r} returned shape {found.shape} for blocks of shape "
            f"{blocks.shape}: {term!r} needs one vector for each block and head, "
            f"{wanted}"
        )
    return found.astype(x.dtype)
