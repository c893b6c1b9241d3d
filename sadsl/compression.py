"""Attention to compressed keys and values: one of each for a block of positions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.precision import wide, widened
from sadsl.call_text import call_text
from sadsl.maps import IndexMap, at_least
from sadsl.named import full, where
from sadsl.term import DROPOUT_KEY, Evaluate, Inputs, Outcome, Setting, Term, read_by


@dataclass(frozen=True, repr=False)
class Compressed(Term):
    """One softmax over the blocks that are past. See ``compressed``, which makes it."""

    length: int = 32
    stride: int = 16
    key: str | None = None
    value: str | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        at_least("compressed", "length", self.length, 1)
        at_least("compressed", "stride", self.stride, 1)
        for name, by in {"key": self.key, "value": self.value}.items():
            if by is not None and not (isinstance(by, str) and by.isidentifier()):
                raise ValueError(
                    f"compressed: {name}={by!r} must be the name of an operand, or None"
                )

    @property
    def blocks(self) -> IndexMap:
        """The blocks that a query sees, as a map whose keys are block numbers."""
        if not self.causal:
            return full()
        return where(lambda q, k: k * self.stride + self.length <= q + 1)

    @property
    def seen(self) -> IndexMap:
        """The tokens of the blocks that a query sees."""
        length, stride = self.length, self.stride
        inside = where(lambda q, k: k % stride < length)
        if self.causal:
            # The end of the last block that is over.
            over = where(lambda q, k: k < (q + 1 - length) // stride * stride + length)
            return inside & over & where(lambda q, k: q + 1 >= length)
        whole = where(lambda q, k, h, n: k < (n - length) // stride * stride + length)
        return inside & whole & where(lambda q, k, h, n: n >= length)

    def num_blocks(self, kv_seq_len: int) -> int:
        """The whole blocks of a sequence."""
        return max(0, (kv_seq_len - self.length) // self.stride + 1)

    @property
    def operands(self) -> Mapping[str, int]:
        """The functions that compress, which have no axes."""
        return {name: 0 for name in (self.key, self.value) if name is not None}

    def reads(self, name: str) -> bool:
        """Whether it is a function that compresses, or what dropout is drawn from."""
        return name in self.operands or name == DROPOUT_KEY

    def __repr__(self) -> str:
        return call_text(self)


def compressed(
    length: int = 32,
    stride: int = 16,
    key: str | None = None,
    value: str | None = None,
    causal: bool = True,
) -> Compressed:
    """A softmax over blocks of positions, each with one key and one value.

    Block ``j`` holds ``length`` positions from ``j * stride`` on, so blocks overlap if
    ``stride < length``; a rest at the end that fills no block is in none. A query sees
    the blocks that end with it or before, so nothing leaks; the first ``length - 1``
    queries see none, and yield 0 (Yuan et al., Native sparse attention:
    hardware-aligned and natively trainable sparse attention, 2025, section 3.3.1).

    It reads no segment ids: blocks span the documents of a packed sequence.

    Args:
      length, stride: positions of a block, and from one block to the next.
      key, value: how keys and values become one, the mean if None; else the name of a
        function in ``operands``, from ``[batch, blocks, length, num_kv_heads, dim]`` to
        ``[batch, blocks, num_kv_heads, dim]`` (in the paper a network that knows the
        positions in a block: the layers' ``BlockCompressor``).
      causal: False: every query sees all blocks.
    """
    return Compressed(length, stride, key, value, causal)


def attend(
    inputs: Inputs,
    term: Compressed,
    given: Mapping[str, Any],
    setting: Setting,
    evaluate: Evaluate,
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
    return evaluate((q, short_k, short_v), term.blocks, mine, setting)


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
