"""Partitions: which regions there are, who is in them, and which ones a query reads.

Regions are numbered like the positions of a short sequence. ``members(n)`` is an index
map from regions to keys, ``seen(n, kv)`` one from queries to regions, and ``support``
the pairs of a query and a key in a region that it reads: ``seen @ members``. No region
that is empty is ever seen. Ren et al., Combiner: full attention transformer with sparse
computation cost, 2021.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Literal, TypeAlias, get_args

from typing_extensions import override

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.named import blocks, full, where
from sadsl.maps.symbols import Symbol, Truth, table
from sadsl.terms.base import check_name

Part = Literal["others", "before", "after"]
KeyOf = Literal["none", "wsum", "proj", "wsum_proj"]

# Levels of a tower come in groups of 7, each a summary sequence 128 times shorter than
# the one before: a block of queries then meets one block of regions a group.
RADIX = 128
_LOW = table(t & -t for t in range(RADIX))
# Whether a region of a group holds, or is seen by, a token; in tokens of ``unit``.
_Held: TypeAlias = Callable[[Symbol, Symbol, int], Truth]


@dataclass(frozen=True, repr=False)
class Partition:
    """Regions of a sequence; made by the functions of the lower-case names."""

    @property
    def support(self) -> IndexMap:
        """The pairs of a query and a key in a region that the query reads."""
        raise NotImplementedError(f"{type(self).__name__} must define support")

    def check(self, n: int) -> None:
        """Refuses a length that the partition is not defined for."""

    def num_regions(self, n: int) -> int:
        """The length of the summary sequence of ``n`` tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define num_regions(n)")

    def members(self, n: int) -> IndexMap:
        """Which keys are in a region."""
        raise NotImplementedError(f"{type(self).__name__} must define members(n)")

    def seen(self, n: int) -> IndexMap:
        """Which regions, none of them empty, a query reads."""
        raise NotImplementedError(f"{type(self).__name__} must define seen(n)")

    def __repr__(self) -> str:
        return call_text(self)


@dataclass(frozen=True, repr=False)
class Spans(Partition):
    """See ``spans``."""

    size: int
    causal: bool = True
    own: bool = False

    def __post_init__(self) -> None:
        at_least("spans", "size", self.size, 1)
        if self.own and self.causal:
            raise ValueError(
                "spans: own=True with causal=True: the summary of a span holds its "
                "later tokens, which a causal query must not read; pass causal=False"
            )

    @property
    @override
    def support(self) -> IndexMap:
        s = self.size
        if self.causal:
            return where(lambda q, k: k // s < q // s)
        return full() if self.own else ~blocks(s)

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
    """See ``tower``.

    Region ``t`` of group ``g`` holds ``low(t) * RADIX**g`` tokens and ends before token
    ``t * RADIX**g``, with ``low`` the lowest set bit; multiples of ``RADIX`` are empty
    and left to the next group.
    """

    @property
    @override
    def support(self) -> IndexMap:
        return where(lambda q, k: k < q)

    def groups(self, n: int) -> list[tuple[int, int, int]]:
        """Of each group: its first region, its number of regions, ``RADIX**g``."""
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
            # Follows from the others, and tells the planner where to look.
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


@dataclass(frozen=True, repr=False)
class Columns(Partition):
    """See ``columns``. Region ``r * width + c`` is column ``c`` without row ``r``."""

    width: int
    causal: bool = True

    def __post_init__(self) -> None:
        at_least("columns", "width", self.width, 1)

    @property
    def side(self) -> Part:
        """Which rows of a column a region holds, seen from its own row."""
        return "before" if self.causal else "others"

    @property
    @override
    def support(self) -> IndexMap:
        w = self.width
        if self.causal:
            return where(lambda q, k: (k // w < q // w) & (k % w != q % w))
        return where(lambda q, k: (k // w != q // w) & (k % w != q % w))

    @override
    def num_regions(self, n: int) -> int:
        return -(-n // self.width) * self.width

    @override
    def members(self, n: int) -> IndexMap:
        w = self.width
        if self.causal:
            return where(lambda q, k: (k % w == q % w) & (k // w < q // w))
        return where(lambda q, k: (k % w == q % w) & (k // w != q // w))

    @override
    def seen(self, n: int) -> IndexMap:
        w = self.width
        of_row = where(lambda q, k: (k // w == q // w) & (k % w != q % w))
        if self.causal:
            return of_row & where(lambda q, k: k >= w)
        # A region of the first row holds someone if its column has a second row.
        return of_row & where(lambda q, k: (k >= w) | (k < n - w))


@dataclass(frozen=True, repr=False)
class Rows(Partition):
    """See ``rows``. Region ``r * width + c`` is row ``r`` without column ``c``."""

    width: int
    causal: bool = True
    part: Part = "others"

    def __post_init__(self) -> None:
        at_least("rows", "width", self.width, 1)
        if self.part not in get_args(Part):
            raise ValueError(
                f"rows: part={self.part!r} must be one of {', '.join(get_args(Part))}"
            )

    def _in_part(self, q: Symbol, k: Symbol) -> Truth:
        """Whether column ``k`` is in the part that column ``q`` names."""
        match self.part:
            case "before":
                return k % self.width < q % self.width
            case "after":
                return k % self.width > q % self.width
            case _:
                return k % self.width != q % self.width

    @property
    @override
    def support(self) -> IndexMap:
        w = self.width
        if self.causal:
            return where(lambda q, k: (k // w < q // w) & self._in_part(q, k))
        return where(lambda q, k: (k // w != q // w) & self._in_part(q, k))

    @override
    def num_regions(self, n: int) -> int:
        return -(-n // self.width) * self.width

    @override
    def members(self, n: int) -> IndexMap:
        w = self.width
        return where(lambda q, k: (k // w == q // w) & self._in_part(q, k))

    @override
    def seen(self, n: int) -> IndexMap:
        w = self.width
        same = where(lambda q, k: k % w == q % w)
        other = (
            where(lambda q, k: k // w < q // w)
            if self.causal
            else where(lambda q, k: k // w != q // w)
        )
        return same & other & self._inhabited(n)

    def _inhabited(self, n: int) -> IndexMap:
        """The regions that hold someone."""
        w = self.width
        last, filled = (n - 1) // w, (n - 1) % w + 1
        first = where(lambda q, k: k % w >= 1)
        if self.part == "before":
            return first
        # Who has someone to the right, in the last row, which may be short, or before.
        right = where(
            lambda q, k: (
                ((k // w < last) & (k % w < w - 1))
                | ((k // w == last) & (k % w < filled - 1))
            )
        )
        return right if self.part == "after" else first | right


@dataclass(frozen=True, repr=False)
class Rowmajor(Partition):
    """See ``rowmajor``. Region ``r * width + c`` is row ``r`` as column ``c`` asks."""

    width: int
    causal: bool = True
    key: KeyOf = "proj"
    proj: str = "proj"

    def __post_init__(self) -> None:
        at_least("rowmajor", "width", self.width, 1)
        if self.key not in get_args(KeyOf):
            raise ValueError(
                f"rowmajor: key={self.key!r} must be one of "
                f"{', '.join(get_args(KeyOf))}"
            )
        check_name("rowmajor", "proj", self.proj)

    @property
    @override
    def support(self) -> IndexMap:
        w = self.width
        return where(lambda q, k: k // w < q // w) if self.causal else ~blocks(w)

    @override
    def check(self, n: int) -> None:
        if n % self.width and not self.causal:
            raise ValueError(
                f"{self!r} does not cover {n} tokens: the last row is short, so that "
                "columns have no query of their own there; pad the sequence to a "
                f"multiple of {self.width}, or use rows({self.width}, causal=False)"
            )

    @override
    def num_regions(self, n: int) -> int:
        return n

    @override
    def members(self, n: int) -> IndexMap:
        return blocks(self.width)

    @override
    def seen(self, n: int) -> IndexMap:
        w = self.width
        same = where(lambda q, k: k % w == q % w)
        if self.causal:
            return same & where(lambda q, k: k // w < q // w)
        return same & where(lambda q, k: k // w != q // w)


def spans(size: int, causal: bool = True, own: bool = False) -> Spans:
    """Runs of ``size`` tokens: a query reads all spans before its own.

    Not ``causal``: all but its own; with ``own``, its own too, which a direct part then
    counts twice, as one published code does. A short last span pools the tokens it has.
    """
    return Spans(size, bool(causal), bool(own))


def tower() -> Tower:
    """Dyadic spans; token ``i`` reads one for each bit set in ``i``: causal.

    Bit ``l`` yields the ``2**l`` tokens before ``i`` with its bits below ``l`` cleared;
    together they are all tokens before ``i``, each once. There is a region a token, and
    a 127th more (a Fenwick tree; Combiner-Logsparse).
    """
    return Tower()


def columns(width: int, causal: bool = True) -> Columns:
    """On rows of ``width`` tokens: each other column, above the row of the query.

    Not ``causal``: each other column without that row. A region a token: regions grow
    with the row (Combiner-Axial-Vertical).
    """
    return Columns(width, bool(causal))


def rows(width: int, causal: bool = True, part: Part = "others") -> Rows:
    """On rows of ``width`` tokens: each row above, without the column of the query.

    Not ``causal``: each other row. ``part`` "before" or "after" takes only the columns
    to the left or right of the query's, as the published code of the mixture does. A
    region a token (Combiner-Axial-Horizontal).
    """
    return Rows(width, bool(causal), part)


def rowmajor(
    width: int, causal: bool = True, key: KeyOf = "proj", proj: str = "proj"
) -> Rowmajor:
    """On rows of ``width`` tokens: each row above, as its token in my column sees it.

    The value of a region is the attention of that token over its whole row; its query
    is the token's own. Not ``causal``: each other row (Combiner-Axial-Rowmajor).

    Args:
      width: tokens in a row.
      causal: whether later rows are hidden.
      key: the key of a region: "none", that of the token; "wsum", the mean of the keys
        of the row by the weights of the value; "proj", what the callable operand
        ``proj`` makes of the values ``[batch, regions, num_q_heads, head_dim_v]``, of
        shape ``[batch, regions, num_q_heads, head_dim]`` (the published code);
        "wsum_proj", what it makes of the means of the keys.
      proj: the name of that operand.
    """
    return Rowmajor(width, bool(causal), key, proj)


Pool = Literal["max", "mean", "sum"]
