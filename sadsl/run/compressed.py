"""Runs attention over a sequence of compressed blocks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.precision import wide, widened
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import read_by
from sadsl.terms.compressed import Compressed


@attend.register
def _(
    term: Compressed, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Attention over the compressed sequence, by the kernels of any map.

    Raises:
      ValueError: a function that compresses is missing, or yields another shape.
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
    """A vector for each whole block of ``x``: the mean, or by the function ``name``.

    Raises:
      ValueError: the function was not given, or yields another shape.
    """
    if name is None:
        return _means(x, length=term.length, stride=term.stride)
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
            f"operand {name!r} made {found.shape} of blocks {blocks.shape}: {term!r} "
            f"needs one vector a block and head, {wanted}"
        )
    return found.astype(x.dtype)


@partial(jax.jit, static_argnames=("length", "stride"))
def _means(
    x: Float[Array, "batch seq heads dim"], *, length: int, stride: int
) -> Float[Array, "batch blocks heads dim"]:
    summed = widened(x)
    window, step = (1, length, 1, 1), (1, stride, 1, 1)
    zero = np.zeros((), summed.dtype)
    total = jax.lax.reduce_window(summed, zero, jax.lax.add, window, step, "valid")
    return (total / length).astype(x.dtype)
