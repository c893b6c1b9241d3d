"""Selects keys by a score that does not depend on the query (dynamic mask attention).

The scores are an operand. Ranks and limits represent the best ``w`` keys of every
prefix, so that memory is linear in the length.
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

# The number of queries whose blocks are counted at a time.
ROWS = 128


@dataclass(frozen=True, repr=False)
class KeyTopw(NamedSelection):
    """The ``w`` keys of the highest score; made by ``key_topw``."""

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
        """A shared choice is among all keys, others among the keys up to a query."""
        return "all" if self.shared else "none"

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {self.bias: 2}

    @property
    @override
    def of_keys(self) -> Mapping[str, int]:
        return {self.bias: 1}

    @property
    @override
    def by_position(self) -> bool:
        # A block at the end of the sequence, which may be short, counts its own keys.
        return not self.shared and self.smooth is None

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        scores = key_scores(content, self.bias)
        rank = descending_ranks(scores)
        finite = jnp.isfinite(scores)
        if self.shared:
            return {"kept": smoothed((rank < self.w) & finite, self.smooth)}
        position = jnp.arange(content.q.shape[2], dtype=jnp.int32) + content.first
        length = jnp.minimum(position + 1, scores.shape[-1])
        limit = least_of_prefixes(rank, length, self.w)
        last = finite.sum(axis=-1, keepdims=True, dtype=jnp.int32) - 1
        # Keys that are not finite rank last, beyond the limit of every prefix.
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
    """The keys of a positive score; made by ``key_positive``."""

    bias: str = "bias"
    smooth: int | None = None

    def __post_init__(self) -> None:
        if self.smooth is not None:
            at_least("key_positive", "smooth", self.smooth, 1)

    @property
    def leak(self) -> Leak:  # type: ignore[override]
        """Without smoothing a key is judged alone, else with its block."""
        return "none" if self.smooth in (None, 1) else "block"

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {self.bias: 2}

    @property
    @override
    def of_keys(self) -> Mapping[str, int]:
        return {self.bias: 1}

    @property
    @override
    def by_token(self) -> bool:
        return self.leak == "none"

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
    """A query sees the ``w`` keys of the highest score among those up to itself.

    Shi et al., Trainable dynamic mask sparse attention, 2025. The scores are an
    operand, floats ``[num_q_heads, kv_seq_len]`` or ``[num_kv_heads, kv_seq_len]``. A
    score of NaN or infinity is never chosen; ties go to the earlier key.

    Args:
      w: keys of a query; all keys where there are fewer.
      bias: the name of the operand with the scores.
      shared: make one choice among all keys for every query, as the released code does
        without a causal mask. Under ``causal()``, early queries may then see no key.
      smooth: the size of blocks of keys; a block is kept whole iff more than half of
        its keys are chosen. The choice then takes ``q_seq_len * kv_seq_len / smooth``
        bools a head.

    Raises:
      ValueError: a size is below 1; in a call, the scores are missing or of another
        shape.

    Example:
      >>> from sadsl.selections import key_topw
      >>> spec = key_topw(1, shared=True)
      >>> kept = {spec.key("kept"): [[0, 1, 0]]}  # [heads, keys]
      >>> print(spec.dense(3, operands=kept)[0].astype(int))
      [[0 1 0]
       [0 1 0]
       [0 1 0]]
    """
    return KeyTopw(w, bias, shared, smooth)


def key_positive(bias: str = "bias", *, smooth: int | None = None) -> KeyPositive:
    """Every query sees the keys whose score is positive.

    Args:
      bias: the name of the operand with the scores, as in ``key_topw``.
      smooth: the size of blocks that are kept whole or not at all, as in ``key_topw``.

    Example:
      >>> from sadsl.selections import key_positive
      >>> spec = key_positive("gate")
      >>> spec
      key_positive(bias='gate')
      >>> spec.operands  # the number of axes
      {'gate': 2}
    """
    return KeyPositive(bias, smooth)


def key_scores(content: Content, name: str) -> Float[Array, "batch_or_1 heads kv"]:
    """The scores in the operand ``name``, float32 for each query head and key.

    Raises:
      ValueError: the operand is missing or of another shape.
    """
    heads, (_, kv_heads, length, _) = content.q.shape[1], content.k.shape
    found = content.operand(name, f"a score for every key, floats [{heads}, {length}]")
    if found.shape[2] != length or found.shape[1] not in (heads, kv_heads):
        raise ValueError(
            f"operand {name!r} has shape {found.shape[1:]} without its batch axis: it "
            f"must have a score for each of the {length} keys in each of {heads} query "
            f"heads or {kv_heads} key heads"
        )
    return jnp.repeat(found.astype(jnp.float32), heads // found.shape[1], axis=1)


def descending_ranks(scores: Float[Array, "*lead n"]) -> Int32[Array, "*lead n"]:
    """The rank of each score: 0 for the highest; ties go to the lower index.

    Scores that are not finite rank last.
    """
    lowest = jnp.where(jnp.isfinite(scores), -scores, jnp.inf)
    order = jnp.argsort(lowest, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def least_of_prefixes(
    values: Int32[Array, "*lead n"], lengths: Int32[Array, " m"], w: int
) -> Int32[Array, "*lead m"]:
    """The ``w``-th least value of each prefix, or its greatest if it is shorter.

    ``values`` are permutations of ``0 .. n - 1``, and ``lengths``, those of the
    prefixes, are at least 1. It decides one bit of the results at a time (Claude et
    al., The wavelet matrix, 2015), in ``n log n`` time.
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
        # A stable partition: values with a 0 bit first.
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
    """The state of ``least_of_prefixes``: values sorted by the bits decided so far.

    ``left`` and ``right`` bound the values that still match, ``nth`` is the rank
    wanted among them, ``found`` the bits of the result.
    """

    values: Array
    left: Array
    right: Array
    nth: Array
    found: Array


def smoothed(kept: Bool[Array, "*lead n"], size: int | None) -> Bool[Array, "*lead n"]:
    """Keeps a block of ``size`` keys whole iff more than half of its keys are kept."""
    if size is None:
        return kept
    whole = jnp.repeat(_majority(kept, size), size, axis=-1)
    return whole[..., : kept.shape[-1]]


def _majority(kept: Bool[Array, "*lead n"], size: int) -> Bool[Array, "*lead blocks"]:
    """Whether more than half of each block is kept; the last block may be short."""
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
    """The blocks that each query keeps, computed for some queries at a time."""
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
