"""Keys chosen by a score of their own, which no query has a say in.

The scores are an operand; what is chosen is seen by ranks, so that the best ``w`` of
every prefix take memory linear in the length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from typing_extensions import override

from pallas_kernels.loops import repeat
from pallas_kernels.varying import alike
from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection

# Queries whose prefixes are counted block by block at a time.
ROWS = 128


@dataclass(frozen=True, repr=False)
class KeyTopw(NamedSelection):
    """The ``w`` keys of the highest score; see ``key_topw``."""

    w: int
    bias: str = "bias"
    shared: bool = False
    smooth: int | None = None

    def __post_init__(self) -> None:
        at_least("key_topw", "w", self.w, 1)
        if self.smooth is not None:
            at_least("key_topw", "smooth", self.smooth, 1)

    @property
    def leak(self) -> Leak:  # type: ignore[override]
        """Shared keys compete with all; those of a prefix among themselves."""
        return "all" if self.shared else "none"

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {self.bias: 2}

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        scores = key_scores(content, self.bias)
        rank = descending_ranks(scores)
        finite = jnp.isfinite(scores)
        if self.shared:
            return {"kept": smoothed((rank < self.w) & finite, self.smooth)}
        position = jnp.arange(content.q.shape[2], dtype=jnp.int32) + content.q_offset
        length = jnp.minimum(position + 1, scores.shape[-1])
        limit = least_of_prefixes(rank, length, self.w)
        last = finite.sum(axis=-1, keepdims=True, dtype=jnp.int32) - 1
        # What is not finite ranks last, beyond the limit of every prefix.
        limit = jnp.minimum(limit, last)
        if self.smooth is None:
            return {"rank": rank, "limit": limit}
        return {"kept": _smoothed_prefixes(rank, limit, position, self.smooth)}

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        if self.shared:
            return self.part("kept")[h, k] == 1
        if self.smooth is None:
            return (self.part("rank")[h, k] <= self.part("limit")[h, q]) & (k <= q)
        return (self.part("kept")[h, q, k // self.smooth] == 1) & (k <= q)


@dataclass(frozen=True, repr=False)
class KeyPositive(NamedSelection):
    """The keys of a positive score; see ``key_positive``."""

    bias: str = "bias"
    smooth: int | None = None

    def __post_init__(self) -> None:
        if self.smooth is not None:
            at_least("key_positive", "smooth", self.smooth, 1)

    @property
    def leak(self) -> Leak:  # type: ignore[override]
        """A key stands for itself, or falls with its block."""
        return "none" if self.smooth in (None, 1) else "block"

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {self.bias: 2}

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        scores = key_scores(content, self.bias)
        return {"kept": smoothed((scores > 0) & jnp.isfinite(scores), self.smooth)}

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return self.part("kept")[h, k] == 1


def key_topw(
    w: int, bias: str = "bias", *, shared: bool = False, smooth: int | None = None
) -> KeyTopw:
    """The ``w`` keys of the highest score among those up to the query.

    Shi et al., Trainable dynamic mask sparse attention, 2025. The scores are the
    operand ``bias``, floats ``[heads, kv_seq_len]`` or one row a key head; -inf and NaN
    are never chosen, and of equal scores the earlier key wins.

    Args:
      w: keys a query; all, where there are fewer.
      bias: the name of the operand.
      shared: one choice among all keys for every query, as in the released code without
        a causal mask; under ``causal()``, early queries may then see no key.
      smooth: keep a whole block of so many keys iff more than half of it is chosen (of
        the last, of as many as it has). The rows of ``key_topw`` then take a table of
        ``q_seq_len * kv_seq_len / smooth`` bools.
    """
    return KeyTopw(w, bias, shared, smooth)


def key_positive(bias: str = "bias", *, smooth: int | None = None) -> KeyPositive:
    """The keys whose score is positive; arguments as of ``key_topw``."""
    return KeyPositive(bias, smooth)


def key_scores(content: Content, name: str) -> Float[Array, "batch_or_1 heads kv"]:
    """The operand ``name``, a float32 for every query head and key.

    Raises:
      ValueError: it is missing, or of another shape.
    """
    heads, (_, kv_heads, length, _) = content.q.shape[1], content.k.shape
    found = content.operand(name, f"a score for every key, floats [{heads}, {length}]")
    if found.shape[2] != length or found.shape[1] not in (heads, kv_heads):
        raise ValueError(
            f"operand {name!r} has shape {found.shape[1:]} beside its batch axis: it "
            f"must have a score for each of the {length} keys in each of {heads} query "
            f"heads or {kv_heads} key heads"
        )
    return jnp.repeat(found.astype(jnp.float32), heads // found.shape[1], axis=1)


def descending_ranks(scores: Float[Array, "*lead n"]) -> Int32[Array, "*lead n"]:
    """The place of each score: the highest is 0, ties as they stand.

    What is not finite comes last.
    """
    lowest = jnp.where(jnp.isfinite(scores), -scores, jnp.inf)
    order = jnp.argsort(lowest, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def least_of_prefixes(
    values: Int32[Array, "*lead n"], lengths: Int32[Array, " m"], w: int
) -> Int32[Array, "*lead m"]:
    """The ``w``-th least value of each prefix, or its greatest if it is shorter.

    ``values`` are permutations of ``0 .. n - 1``, ``lengths`` at least 1. A descent
    through the bits (Claude et al., The wavelet matrix, 2015): ``n log n`` time in all.
    """
    bits = max(1, (values.shape[-1] - 1).bit_length())
    right = jnp.broadcast_to(lengths, (*values.shape[:-1], lengths.shape[0]))
    nothing = jnp.zeros_like(right)

    def descend(step: Array, state: _Descent) -> _Descent:
        values, left, right, nth, found = state
        place = jnp.left_shift(1, bits - 1 - step)
        ones = (values & place) != 0
        zeros = jnp.cumsum(~ones, axis=-1, dtype=jnp.int32)
        zeros = jnp.pad(zeros, [(0, 0)] * (zeros.ndim - 1) + [(1, 0)])
        below, above = (
            jnp.take_along_axis(zeros, end, axis=-1) for end in (left, right)
        )
        total = zeros[..., -1:]
        is_zero = nth < above - below
        # Zeros before ones, each as they stood.
        order = jnp.argsort(ones, axis=-1, stable=True)
        return _Descent(
            jnp.take_along_axis(values, order, axis=-1),
            jnp.where(is_zero, below, total + left - below),
            jnp.where(is_zero, above, total + right - above),
            jnp.where(is_zero, nth, nth - (above - below)),
            jnp.where(is_zero, found, found + place),
        )

    start = _Descent(values, nothing, right, jnp.minimum(w, right) - 1, nothing)
    return repeat(bits, descend, alike(start)).found


class _Descent(NamedTuple):
    """Values by the bits passed, the part of them that matches, and the rank in it."""

    values: Array
    left: Array
    right: Array
    nth: Array
    found: Array


def smoothed(kept: Bool[Array, "*lead n"], size: int | None) -> Bool[Array, "*lead n"]:
    """Blocks of ``size`` whole iff more than half of one is kept; the last is short."""
    if size is None:
        return kept
    whole = jnp.repeat(_majority(kept, size), size, axis=-1)
    return whole[..., : kept.shape[-1]]


def _majority(kept: Bool[Array, "*lead n"], size: int) -> Bool[Array, "*lead blocks"]:
    n = kept.shape[-1]
    spare = [(0, 0)] * (kept.ndim - 1) + [(0, -n % size)]
    blocks = jnp.pad(kept, spare).reshape(*kept.shape[:-1], -1, size)
    first = jnp.arange(blocks.shape[-2], dtype=jnp.int32) * size
    members = jnp.minimum(size, n - first)
    count = blocks.sum(axis=-1, dtype=jnp.int32)
    return 2 * count > jnp.broadcast_to(members, count.shape)


def _smoothed_prefixes(
    rank: Int32[Array, "batch heads kv"],
    limit: Int32[Array, "batch heads q"],
    position: Int32[Array, " q"],
    size: int,
) -> Bool[Array, "batch heads q blocks"]:
    """The blocks that each query keeps, some queries at a time."""
    rows = limit.shape[-1]
    key = jnp.arange(rank.shape[-1], dtype=jnp.int32)

    def some(part: tuple[Array, Array]) -> Array:
        limits, at = part  # [rows, batch, heads], [rows]
        kept = rank[None] <= limits[..., None]
        kept &= (key[None] <= at[:, None])[:, None, None]
        return _majority(kept, size)

    spare = -rows % ROWS
    limits = jnp.pad(jnp.moveaxis(limit, -1, 0), [(0, spare), (0, 0), (0, 0)])
    at = jnp.pad(position, (0, spare))
    steps = limits.reshape(-1, ROWS, *limit.shape[:2])
    found = jax.lax.map(some, (steps, at.reshape(-1, ROWS)))
    found = found.reshape(-1, *found.shape[2:])[:rows]
    return jnp.moveaxis(found, 0, 2)
