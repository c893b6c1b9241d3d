"""Biases: numbers added to the scaled, capped scores of pairs, before the softmax.

A bias is an expression, like a map: ``bias(lambda q, k, h: ...)`` is traced once on
symbols. From it the compiler derives where each part is computed. Arithmetic of
positions runs in the kernel, and nothing is stored for it. A look-up is made outside,
in the smallest layout that holds it: a vector over queries or keys, a vector of
diagonals if it depends on ``q - k`` alone, else an array of all pairs. Learned arrays
get their gradients in any of them.
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
# Two lengths: an axis as long in both does not depend on the length.
LENGTHS = 1 << 20, 1 << 21


class Bias:
    """Numbers added to scores; subclass it as a frozen dataclass with ``of_heads``.

    ``a + b`` adds both. ``repr`` is code that builds the bias again.
    """

    def of_heads(self, num_heads: int) -> Real:
        """The number added to query ``Q`` and key ``K`` in head ``H``, traced."""
        raise NotImplementedError(f"{type(self).__name__} must define of_heads")

    def score(self, num_heads: int) -> nodes.Score:
        """The expression for so many query heads."""
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
        """The axes, but for the batch, of the floats that it reads."""
        return {w.name: len(w.index) for w in nodes.weights(self.score(1))}

    @property
    def integer_operands(self) -> dict[str, int]:
        """The axes, but for the batch, of the integers that it reads."""
        found = nodes.integer_operands(self.score(1))
        return {operand.name: len(operand.index) for operand in found}

    def reads(self, name: str) -> bool:
        """Whether it takes the run-time array ``name``."""
        return name in self.operands or name in self.integer_operands

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The arrays that a layer should learn: those whose size no length decides."""
        found = {}
        for look_up in nodes.weights(self.score(sizes.num_q_heads)):
            shape = tuple(_axis(i, sizes.num_q_heads) for i in look_up.index)
            if None not in shape:
                found[look_up.name] = Learned(tuple(n for n in shape if n is not None))
        return found

    def __repr__(self) -> str:
        return call_text(self)


def _axis(index: ir.Expr, num_heads: int) -> int | None:
    """The entries of an axis, or None if the lengths of a call decide it."""
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
    """An expression as it was traced; see ``bias``, which makes it."""

    node: nodes.Score

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return Real(self.node)

    def __repr__(self) -> str:
        return f"bias(lambda q, k, h: {nodes.show_score(self.node)})"


@dataclass(frozen=True, repr=False)
class BiasSum(Bias):
    """Two biases added."""

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
    """A slope a head times the distance; see ``alibi``, which makes it."""

    slopes: tuple[float, ...] | None = None

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        slopes = alibi_slopes(num_heads) if self.slopes is None else self.slopes
        return table(slopes)[H] * -abs(Q - K)


@dataclass(frozen=True, repr=False)
class T5Bias(Bias):
    """A learned number a bucket of distances; see ``t5_bias``, which makes it."""

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
                f"t5_bias: max_distance={self.max_distance} must be above the "
                f"{buckets // 2} distances that have a bucket of their own"
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
    """A learned number a distance; see ``distance_bias``, which makes it."""

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
    """A number a pair; see ``pair_bias``, which makes it."""

    name: str

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return weights(self.name)[H, Q, K]


@dataclass(frozen=True, repr=False)
class KeyBias(Bias):
    """A number a key; see ``key_bias``, which makes it."""

    name: str

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads
        return weights(self.name)[H, K]


def bias(of_pair: Callable[..., Any]) -> Traced:
    """A number for each pair: ``bias(lambda q, k: ...)``, or with the head ``h``.

    A parameter with a default keeps it, as in ``lambda q, k, d=d: ...``.
    Traced once on symbols: integers of positions as in ``where``; floats; their sums
    and products; ``table((0.5, 0.25))[h]``; and ``weights(name)[h, q - k]``, a run-time
    array that may be learned. ``q_offset`` counts: positions are the true ones. To
    leave pairs out is the map's part.

    Raises:
      TypeError: what the function returns is no number of positions.
    """
    names = bound(of_pair, "bias", ("q", "k", "h"))
    with tracing("the function of bias"):
        return traced_bias(of_pair(*(POSITIONS[name] for name in names)))


def traced_bias(value: Any) -> Traced:
    """The bias of a traced number, or of a constant."""
    return Traced(score_node(value))


def alibi(slopes: Iterable[float] | None = None) -> Alibi:
    """``-slope[h] * |q - k|``: attention with linear biases, nothing learned.

    Press et al., Train short, test long (2022), section 3; ``slopes`` are one a query
    head, by default those of ``alibi_slopes``. Computed in the kernel from positions.
    """
    return Alibi(None if slopes is None else numbers(slopes))


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """``2 ** (-8 * (h + 1) / num_heads)`` for a power of two of heads.

    Otherwise those of the next lower power of two, then every other one of the next
    higher, as in the published code of Press et al. (2022).
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
    """A learned number for each head and bucket of ``k - q``, not scaled.

    Raffel et al., Exploring the limits of transfer learning (T5, 2020), section 2.1,
    and its published code: half of the buckets hold one distance each, the others grow
    to ``max_distance``, and all beyond share the last. A causal layer counts only the
    keys before the query; ``bidirectional`` has half of the buckets on either side.

    Args:
      name: of the operand ``[num_q_heads or 1, num_buckets]``.
      num_buckets, max_distance, bidirectional: as above.
    """
    return T5Bias(name, num_buckets, max_distance, bool(bidirectional))


def t5_buckets(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The bucket of each distance ``0 .. max_distance`` on one side."""
    exact = num_buckets // 2
    rest = num_buckets - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        step = rest * math.log(distance / exact) / math.log(max_distance / exact)
        # A distance at the very border of a bucket belongs to it.
        return min(exact + math.floor(step + 1e-9), num_buckets - 1)

    return tuple(map(bucket, range(max_distance + 1)))


def distance_bias(name: str, left: int, right: int = 0) -> DistanceBias:
    """A learned number for each head and distance ``q - k``.

    Distances count from ``-right`` to ``left``; those beyond have the number of the
    last one within. The operand is ``[num_q_heads or 1, left + right + 1]``; its entry
    ``right`` is that of ``q == k``.
    """
    return DistanceBias(name, left, right)


def pair_bias(name: str) -> PairBias:
    """A number for each pair: the operand ``[batch, num_q_heads or 1, q_seq, kv_seq]``.

    The batch axis may be 1 or left out; more keys or queries than there are do no harm.
    Gradients reach it. Memory is quadratic, as it is already. ``-inf`` leaves a pair
    out, though its block is visited, which a map would avoid; a finite number never
    does: a row of nothing but ``finfo.min`` is a softmax over that row.
    """
    return PairBias(name)


def key_bias(name: str) -> KeyBias:
    """A number for each key: the operand ``[batch, num_q_heads or 1, kv_seq]``.

    The batch axis may be 1 or left out. Gradients reach it; ``-inf`` leaves a key out.
    """
    return KeyBias(name)
