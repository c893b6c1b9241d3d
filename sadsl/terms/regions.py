"""Partitions of a sequence into regions: their tokens, and which ones a query reads.

Regions are numbered like the positions of a short sequence. ``members(n)`` is an index
map from regions to keys, and ``seen(n)`` one from queries to regions. ``support`` has
the pairs of a query and a key in a region that the query reads: ``seen @ members``. No
query reads an empty region. Ren et al., Combiner: full attention transformer with
sparse computation cost, 2021.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Literal, TypeAlias

from typing_extensions import override

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.named import blocks, full, where
from sadsl.maps.symbols import Symbol, Truth, table

Pool = Literal["max", "mean", "sum"]

# The levels of a tower form groups of 7. The regions of each group are a sequence 128
# times shorter than that of the group before. So a block of queries meets one block of
# regions in each group.
RADIX = 128
_LOW = table(t & -t for t in range(RADIX))
# Whether a region of a group holds a token, or is read by it: (region, token, unit).
_Held: TypeAlias = Callable[[Symbol, Symbol, int], Truth]


@dataclass(frozen=True, repr=False)
class Partition:
    """The base class of partitions; functions with lower-case names make them."""

    @property
    def support(self) -> IndexMap:
        """The pairs of a query and a key in a region that the query reads."""
        raise NotImplementedError(f"{type(self).__name__} must define support")

    def check(self, n: int) -> None:
        """Refuses a length for which the partition is not defined.

        Raises:
          ValueError: it is not defined for ``n`` tokens.
        """

    def divides(self, size: int) -> bool:
        """Whether parts of ``size`` tokens have their own regions.

        The regions of the whole are then those of the first part, of the second, and so
        on: each part makes its own without the tokens of others.
        """
        del size
        return False

    def num_regions(self, n: int) -> int:
        """The number of regions of ``n`` tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define num_regions(n)")

    def members(self, n: int) -> IndexMap:
        """Which keys are in a region: a map from regions to keys."""
        raise NotImplementedError(f"{type(self).__name__} must define members(n)")

    def seen(self, n: int) -> IndexMap:
        """Which regions a query reads: a map from queries to regions; none is empty."""
        raise NotImplementedError(f"{type(self).__name__} must define seen(n)")

    def __repr__(self) -> str:
        return call_text(self)


@dataclass(frozen=True, repr=False)
class Spans(Partition):
    """Runs of equal length; see ``spans``. Region ``j`` is run ``j``."""

    size: int
    causal: bool = True
    own: bool = False

    def __post_init__(self) -> None:
        at_least("spans", "size", self.size, 1)
        if self.own and self.causal:
            raise ValueError(
                "spans: own=True with causal=True: the summary of a span depends on "
                "its later tokens, which a causal query must not read; pass "
                "causal=False"
            )

    @property
    @override
    def support(self) -> IndexMap:
        s = self.size
        if self.causal:
            return where(lambda q, k: k // s < q // s)
        return full() if self.own else ~blocks(s)

    @override
    def divides(self, size: int) -> bool:
        return size % self.size == 0

    @override
    def num_regions(self, n: int) -> int:
        return -(-n // self.size)

    @override
    def members(self, n: int) -> IndexMap:
        return where(lambda q, k: k // self.size == q)

    @override
    def seen(self, n: int) -> IndexMap:
        if self.causal:
            return where(lambda q, k: k < q // self.size)
        if self.own:
            return full()
        return where(lambda q, k: k != q // self.size)


@dataclass(frozen=True, repr=False)
class Tower(Partition):
    """Dyadic spans; see ``tower``.

    Region ``t`` of group ``g`` holds ``low(t) * RADIX**g`` tokens and ends before token
    ``t * RADIX**g``, where ``low(t)`` is the lowest set bit of ``t``. Regions whose
    ``t`` is a multiple of ``RADIX`` are empty: the next group has them.
    """

    @property
    @override
    def support(self) -> IndexMap:
        return where(lambda q, k: k < q)

    def groups(self, n: int) -> list[tuple[int, int, int]]:
        """For each group: its first region, its number of regions, and ``RADIX**g``."""
        found, start, unit = [], 0, 1
        while True:
            count = -(-n // unit)
            found.append((start, count, unit))
            start, unit = start + count, unit * RADIX
            if unit >= n:
                return found

    @override
    def num_regions(self, n: int) -> int:
        start, count, _ = self.groups(n)[-1]
        return start + count

    @override
    def members(self, n: int) -> IndexMap:
        def held(region: Symbol, token: Symbol, unit: int) -> Truth:
            at = token // unit
            inside = (at < region) & (region - _LOW[region % RADIX] <= at)
            # The last condition follows from the others; it helps the planner.
            return inside & (at // RADIX == region // RADIX)

        return where(lambda q, k: self._any(n, q, k, held))

    @override
    def seen(self, n: int) -> IndexMap:
        def held(region: Symbol, token: Symbol, unit: int) -> Truth:
            at = token // unit
            inside = (region <= at) & (at < region + _LOW[region % RADIX])
            return inside & (at // RADIX == region // RADIX)

        return where(lambda q, k: self._any(n, k, q, held))

    def _any(self, n: int, region: Symbol, token: Symbol, held: _Held) -> Truth:
        """``held`` in the group of the region."""
        groups = self.groups(n)
        if len(groups) == 1:
            return held(region, token, 1)
        terms = [
            (region >= start) & (region < start + count)
            & held(region - start, token, unit)
            for start, count, unit in groups
        ]  # fmt: skip
        return reduce(or_, terms)


def spans(size: int, causal: bool = True, own: bool = False) -> Spans:
    """Runs of ``size`` tokens; a query reads all spans before its own (Combiner-Fixed).

    A last span that is short pools the tokens it has.

    Args:
      size: tokens in a span.
      causal: False: a query reads all spans but its own.
      own: True, with ``causal=False``: it reads its own span too. A direct part over
        that span then counts its keys twice, as one published code does.

    Raises:
      ValueError: ``size`` is below 1, or ``own`` is given with ``causal``.

    Example:
      The spans that each of 6 tokens reads:

      >>> import sadsl as sa
      >>> print(sa.spans(2).seen(6).dense(6, 3)[0].astype(int))
      [[0 0 0]
       [0 0 0]
       [1 0 0]
       [1 0 0]
       [1 1 0]
       [1 1 0]]
    """
    return Spans(size, bool(causal), bool(own))


def tower() -> Tower:
    """Spans with powers of two as lengths; a query reads one for each of its set bits.

    If bit ``l`` of position ``i`` is set, query ``i`` reads the span of ``2**l`` tokens
    that ends before ``i`` with its bits below ``l`` cleared. Together these are all
    tokens before ``i``, each once: a Fenwick tree (Combiner-Logsparse). It is causal.
    There are about ``128 / 127`` regions for each token.

    Example:
      Query 6 (binary 110) reads the spans of tokens 4 to 5 and 0 to 3:

      >>> import sadsl as sa
      >>> read = sa.tower().seen(8).dense(8, 8)[0, 6]
      >>> print(sa.tower().members(8).dense(8, 8)[0][read].astype(int))
      [[1 1 1 1 0 0 0 0]
       [0 0 0 0 1 1 0 0]]
    """
    return Tower()
