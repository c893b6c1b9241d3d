"""Biases: numbers added to the scaled and capped scores of pairs, before the softmax.

A bias is an expression, like a map: ``bias(lambda q, k, h: ...)`` is traced once on
symbols. From it the compiler derives where each part is computed. Arithmetic on
positions runs in the kernel, and nothing is stored for it. A look-up is made outside
the kernel, in the smallest layout that holds it: a vector over queries or keys, one of
diagonals if it depends on ``q - k`` alone, else all pairs. Each layout has gradients.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lowering import ir
from lowering.bias import nodes
from lowering.ranges.verify import index_range
from sadsl.maps.call_text import call_text
from sadsl.maps.numbers import Real, numbers, score_node, weights
from sadsl.maps.symbols import POSITIONS, maximum, minimum, table
from sadsl.maps.traced import bound, tracing
from sadsl.terms.base import LayerSizes, Learned

Q, K, H = (POSITIONS[name] for name in "qkh")
# An axis that is equally long for these two lengths does not depend on the length.
LENGTHS = 1 << 20, 1 << 21


class Bias:
    """The base class of biases; a subclass is a frozen dataclass with ``of_heads``.

    ``a + b`` adds both biases. ``repr`` is code that builds the bias again.
    """

    def of_heads(self, num_heads: int) -> Real:
        """The number added to the score of query ``Q`` and key ``K`` in head ``H``.

        ``Q``, ``K`` and ``H`` are symbols of this module; ``num_heads`` is the number
        of query heads.
        """
        raise NotImplementedError(f"{type(self).__name__} must define of_heads")

    def score(self, num_heads: int) -> nodes.Score:
        """The expression of the bias, for a number of query heads."""
        with tracing(f"of_heads of {type(self).__name__}"):
            return score_node(self.of_heads(num_heads))

    def __add__(self, other: "Bias") -> "Bias":
        if not isinstance(other, Bias):
            raise TypeError(f"`+` adds a bias to a bias, not {other!r}")
        return BiasSum(self, other)

    def __bool__(self) -> bool:
        raise TypeError(
            "a bias has no truth value: write `a + b` instead of `a and b`, and "
            "compare with `is None` instead of `if bias`"
        )

    @property
    def operands(self) -> dict[str, int]:
        """The operands of floats that it reads: names and axes beside the batch."""
        return {w.name: len(w.index) for w in nodes.weights(self.score(1))}

    @property
    def integer_operands(self) -> dict[str, int]:
        """The operands of integers that it reads: names and axes beside the batch."""
        found = nodes.integer_operands(self.score(1))
        return {operand.name: len(operand.index) for operand in found}

    def reads(self, name: str) -> bool:
        """Whether it reads the operand ``name``."""
        return name in self.operands or name in self.integer_operands

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The operands that a layer should learn: those of a size without a length."""
        found = {}
        for look_up in nodes.weights(self.score(sizes.num_q_heads)):
            shape = tuple(_axis(i, sizes.num_q_heads) for i in look_up.index)
            if None not in shape:
                found[look_up.name] = Learned(tuple(n for n in shape if n is not None))
        return found

    def __repr__(self) -> str:
        return call_text(self)


def _axis(index: ir.Expr, num_heads: int) -> int | None:
    """The size of an axis indexed by ``index``; None if it depends on the lengths."""
    ends = set()
    for length in LENGTHS:
        new: dict[ir.Axis, ir.Expr] = {"n": ir.Const(length)}
        node = ir.substitute(index, new)
        if any(isinstance(n, ir.Operand) for n in ir.walk(node)):
            return None
        heads = range(num_heads) if "h" in ir.axes(node) else (0,)
        of_head = [ir.substitute(node, {"h": ir.Const(h)}) for h in heads]
        ends.add(max(index_range(i, length, length)[1] for i in of_head))
    return ends.pop() + 1 if len(ends) == 1 else None


@dataclass(frozen=True, repr=False)
class Traced(Bias):
    """A traced expression; see ``bias``, which makes it."""

    node: nodes.Score

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return Real(self.node)

    def __repr__(self) -> str:
        return f"bias(lambda q, k, h: {nodes.show_score(self.node)})"


@dataclass(frozen=True, repr=False)
class BiasSum(Bias):
    """The sum of two biases."""

    left: Bias
    right: Bias

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        return self.left.of_heads(num_heads) + self.right.of_heads(num_heads)

    def __repr__(self) -> str:
        right = (
            f"({self.right!r})" if isinstance(self.right, BiasSum) else repr(self.right)
        )
        return f"{self.left!r} + {right}"


@dataclass(frozen=True, repr=False)
class Alibi(Bias):
    """``-slope * distance`` with one slope for each head; see ``alibi``."""

    slopes: tuple[float, ...] | None = None

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        slopes = alibi_slopes(num_heads) if self.slopes is None else self.slopes
        return table(slopes)[H] * -abs(Q - K)


@dataclass(frozen=True, repr=False)
class T5Bias(Bias):
    """A learned number for each bucket of distances; see ``t5_bias``."""

    name: str = "bias"
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        even = self.num_buckets % 2 == 0 or not self.bidirectional
        if buckets < 2 or not even:
            least = "even and at least 4" if self.bidirectional else "at least 2"
            raise ValueError(f"t5_bias: num_buckets={self.num_buckets} must be {least}")
        if self.max_distance <= buckets // 2:
            raise ValueError(
                f"t5_bias: max_distance={self.max_distance} must be above "
                f"{buckets // 2}, the number of distances with a bucket of their own"
            )

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        far = self.max_distance
        if not self.bidirectional:
            bucket = table(t5_buckets(self.num_buckets, far))
            return weights(self.name)[H, bucket[minimum(maximum(Q - K, 0), far)]]
        half = self.num_buckets // 2
        of_distance = t5_buckets(half, far)
        after = tuple(half + b for b in of_distance[1:])
        bucket = table((*of_distance[::-1], *after))
        return weights(self.name)[H, bucket[minimum(maximum(K - Q, -far), far) + far]]


@dataclass(frozen=True, repr=False)
class DistanceBias(Bias):
    """A learned number for each distance; see ``distance_bias``."""

    name: str
    left: int
    right: int = 0

    def __post_init__(self) -> None:
        if self.left + self.right < 0:
            raise ValueError(
                f"distance_bias: from left={self.left} to right={self.right} there is "
                "no distance: left + right must be at least 0"
            )

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        distance = minimum(maximum(Q - K, -self.right), self.left)
        return weights(self.name)[H, distance + self.right]


@dataclass(frozen=True, repr=False)
class PairBias(Bias):
    """A number for each pair; see ``pair_bias``."""

    name: str

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return weights(self.name)[H, Q, K]


@dataclass(frozen=True, repr=False)
class KeyBias(Bias):
    """A number for each key; see ``key_bias``."""

    name: str

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return weights(self.name)[H, K]


def bias(of_pair: Callable[..., Any]) -> Traced:
    """A number for each pair, written as a function of positions.

    The function is traced once on symbols. It may use integers of positions as in
    ``where``; floats; sums and products; ``table((0.5, 0.25))[h]``; and
    ``weights(name)[h, q - k]``, a run-time array that may be learned. Positions include
    ``q_offset``. To leave pairs out, use a map.

    Args:
      of_pair: ``lambda q, k: ...``, or ``lambda q, k, h: ...`` with the head. A
        parameter with a default keeps it, as in ``lambda q, k, d=d: ...``.

    Raises:
      TypeError: the function does not return a number made of positions.

    Example:
      >>> import sadsl as sa
      >>> sa.bias(lambda q, k: -0.5 * abs(q - k))
      bias(lambda q, k, h: (-0.5) * maximum(q - k, (q - k) * -1))
      >>> learned = sa.bias(lambda q, k, h: sa.weights("per_key")[h, k])
      >>> learned.operands
      {'per_key': 2}
    """
    names = bound(of_pair, "bias", ("q", "k", "h"))
    with tracing("the function of bias"):
        return traced_bias(of_pair(*(POSITIONS[name] for name in names)))


def traced_bias(value: Any) -> Traced:
    """The bias of a traced number or a constant."""
    return Traced(score_node(value))


def alibi(slopes: Iterable[float] | None = None) -> Alibi:
    """The bias ``-slope[h] * |q - k|``; nothing is learned.

    Press et al., Train short, test long: attention with linear biases enables input
    length extrapolation (2022), section 3. The kernel computes it from positions.

    Args:
      slopes: one number for each query head; those of the paper if None.

    Example:
      >>> import sadsl as sa
      >>> sa.softmax(sa.causal(), bias=sa.alibi())
      softmax(causal(), bias=alibi())
      >>> sa.alibi((0.5, 0.25)) + sa.key_bias("penalty")
      alibi(slopes=(0.5, 0.25)) + key_bias('penalty')
    """
    return Alibi(None if slopes is None else numbers(slopes))


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi: ``2 ** (-8 * (h + 1) / num_heads)`` for a power of two.

    For other numbers, the slopes of the next lower power of two, followed by every
    other slope of the next higher one, as in the published code of Press et al. (2022).

    >>> alibi_slopes(3)
    (0.0625, 0.00390625, 0.25)
    """
    low = 1 << (num_heads.bit_length() - 1)
    of_low = tuple(2.0 ** (-8 * (h + 1) / low) for h in range(low))
    between = tuple(2.0 ** (-4 * (h + 1) / low) for h in range(0, 2 * low, 2))
    return of_low + between[: num_heads - low]


def t5_bias(
    name: str = "bias",
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> T5Bias:
    """A learned number for each head and bucket of distances.

    Half of the buckets hold one distance each. The others widen logarithmically up to
    ``max_distance``, and all greater distances share the last one (Raffel et al.,
    Exploring the limits of transfer learning, T5, 2020, section 2.1, and its code). The
    number is added after the scale; T5 itself has none, which is ``sm_scale=1.0``.

    Args:
      name: the operand ``[num_q_heads or 1, num_buckets]``, of floats.
      num_buckets: number of buckets.
      max_distance: the distance from which on all share the last bucket.
      bidirectional: False: later keys share the bucket of distance 0, for causal maps.
        True: half of the buckets are for keys before, half for keys after the query.

    Raises:
      ValueError: the buckets are too few, or do not fit ``max_distance``.

    Example:
      >>> import sadsl as sa
      >>> sa.t5_bias(num_buckets=8, max_distance=16).operands
      {'bias': 2}
      >>> from sadsl.terms.biases import t5_buckets
      >>> t5_buckets(8, 16)  # of the distances 0 to 16
      (0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7)
    """
    return T5Bias(name, num_buckets, max_distance, bool(bidirectional))


def t5_buckets(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The bucket of each distance ``0 .. max_distance``, on one side of the query."""
    exact = num_buckets // 2
    rest = num_buckets - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        step = rest * math.log(distance / exact) / math.log(max_distance / exact)
        # A distance exactly at the lower border of a bucket belongs to it.
        return min(exact + math.floor(step + 1e-9), num_buckets - 1)

    return tuple(map(bucket, range(max_distance + 1)))


def distance_bias(name: str, left: int, right: int = 0) -> DistanceBias:
    """A learned number for each head and distance ``q - k``, clipped to a range.

    The bias is ``table[h, clip(q - k, -right, left) + right]`` (Shaw et al.,
    Self-attention with relative position representations, 2018, clips likewise).

    Args:
      name: the operand ``table``, ``[num_q_heads or 1, left + right + 1]``, of floats.
      left: the greatest distance before the query with a number of its own.
      right: the greatest distance after the query with a number of its own.

    Raises:
      ValueError: ``left + right`` is negative.

    Example:
      >>> import sadsl as sa
      >>> sa.softmax(sa.causal(), bias=sa.distance_bias("near", left=16))
      softmax(causal(), bias=distance_bias('near', 16))
    """
    return DistanceBias(name, left, right)


def pair_bias(name: str) -> PairBias:
    """A number for each pair, from an array of all pairs.

    Gradients reach the array. ``-inf`` leaves a pair out, but its block is still
    visited; a map avoids that. A finite number never leaves a pair out: a row of
    nothing but ``finfo.min`` is a softmax over that row.

    Args:
      name: the operand ``[batch, num_q_heads or 1, q_seq, kv_seq]``, of floats. Its
        batch axis may be 1 or missing, and the last two axes may be longer than the
        call.

    Example:
      >>> import sadsl as sa
      >>> sa.softmax(sa.causal(), bias=sa.pair_bias("scores")).operands
      {'scores': 3}
    """
    return PairBias(name)


def key_bias(name: str) -> KeyBias:
    """A number for each key.

    Gradients reach the array. ``-inf`` leaves a key out.

    Args:
      name: the operand ``[batch, num_q_heads or 1, kv_seq]``, of floats. Its batch axis
        may be 1 or missing.

    Example:
      >>> import sadsl as sa
      >>> sa.softmax(sa.full(), bias=sa.key_bias("penalty")).operands
      {'penalty': 2}
    """
    return KeyBias(name)
