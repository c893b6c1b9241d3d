"""Partitions of a grid of tokens: its columns and rows, as regions.

The grid has rows of ``width`` tokens. Ren et al., Combiner: full attention transformer
with sparse computation cost, 2021, section 4.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import override

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.named import blocks, where
from sadsl.maps.operand_names import check_operand_name
from sadsl.maps.symbols import Symbol, Truth
from sadsl.terms.regions import Partition

Part = Literal["others", "before", "after"]
KeyOf = Literal["none", "wsum", "proj", "wsum_proj"]


@dataclass(frozen=True, repr=False)
class Columns(Partition):
    """Columns of a grid; see ``columns``.

    Region ``r * width + c`` is column ``c`` above row ``r``, or without row ``r`` if
    not causal.
    """

    width: int
    causal: bool = True

    def __post_init__(self) -> None:
        at_least("columns", "width", self.width, 1)

    @property
    def side(self) -> Part:
        """Which rows of its column a region holds, relative to its own row."""
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
        # A region of the first row is not empty if its column has a second row.
        return of_row & where(lambda q, k: (k >= w) | (k < n - w))


@dataclass(frozen=True, repr=False)
class Rows(Partition):
    """Rows of a grid; see ``rows``.

    Region ``r * width + c`` is row ``r`` without column ``c``, or a side of it.
    """

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
        """Whether the column of ``k`` is in the part beside the column of ``q``."""
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
    def divides(self, size: int) -> bool:
        return size % self.width == 0

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
        """The regions that are not empty, as a map whose keys are regions."""
        w = self.width
        last, filled = (n - 1) // w, (n - 1) % w + 1
        first = where(lambda q, k: k % w >= 1)
        if self.part == "before":
            return first
        # Cells with another cell to their right; the last row may be short.
        right = where(
            lambda q, k: (
                ((k // w < last) & (k % w < w - 1))
                | ((k // w == last) & (k % w < filled - 1))
            )
        )
        return right if self.part == "after" else first | right


@dataclass(frozen=True, repr=False)
class Rowmajor(Partition):
    """Rows of a grid, summarised for each token; see ``rowmajor``.

    Region ``r * width + c`` is row ``r``, summarised by the query of its column ``c``.
    """

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
        check_operand_name("rowmajor: proj", self.proj)

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
    def divides(self, size: int) -> bool:
        return size % self.width == 0

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


def columns(width: int, causal: bool = True) -> Columns:
    """Columns of a grid with rows of ``width`` tokens (Combiner-Axial-Vertical).

    A query reads each other column, as far as it is above its row. There is one region
    for each token, since each row has its own part of a column.

    Args:
      width: tokens in a row.
      causal: False: it reads each other column without the token in its row.

    Raises:
      ValueError: ``width`` is below 1.

    Example:
      The keys in regions that query 5 of a 2 x 4 grid reads (column 1, row 1):

      >>> import sadsl as sa
      >>> print(sa.columns(4).support.dense(8)[0, 5].reshape(2, 4).astype(int))
      [[1 0 1 1]
       [0 0 0 0]]
    """
    return Columns(width, bool(causal))


def rows(width: int, causal: bool = True, part: Part = "others") -> Rows:
    """Rows of a grid with rows of ``width`` tokens (Combiner-Axial-Horizontal).

    A query reads each row above its own, without its column. There is one region for
    each token, since each column leaves out another token.

    Args:
      width: tokens in a row.
      causal: False: it reads each other row.
      part: "others": all columns but that of the query; "before" or "after": only those
        to its left or right, as the published code of the mixture has it.

    Raises:
      ValueError: ``width`` is below 1, or ``part`` is unknown.

    Example:
      The keys in regions that query 5 of a 2 x 4 grid reads (column 1, row 1):

      >>> import sadsl as sa
      >>> print(sa.rows(4).support.dense(8)[0, 5].reshape(2, 4).astype(int))
      [[1 0 1 1]
       [0 0 0 0]]
    """
    return Rows(width, bool(causal), part)


def rowmajor(
    width: int, causal: bool = True, key: KeyOf = "proj", proj: str = "proj"
) -> Rowmajor:
    """Rows of a grid, each summarised for every column (Combiner-Axial-Rowmajor).

    A query reads each row above its own, through the token of that row in its column:
    the value of the region is the attention of that token over its whole row.

    Args:
      width: tokens in a row.
      causal: False: a query reads each other row; the length is then a multiple of
        ``width``.
      key: the key of a region. "none": that of the token. "wsum": the mean of the keys
        of the row, with the weights of the value. "proj": the callable operand ``proj``
        of the values, from ``[batch, regions, num_q_heads, head_dim_v]`` to ``[batch,
        regions, num_q_heads, head_dim]`` (the published code). "wsum_proj": the same
        operand of the means of the keys.
      proj: the name of that operand.

    Raises:
      ValueError: ``width`` is below 1, ``key`` is unknown, or ``proj`` is not a name.

    Example:
      The tokens through which query 5 of a 2 x 4 grid reads rows (column 1, row 1):

      >>> import sadsl as sa
      >>> print(sa.rowmajor(4).seen(8).dense(8)[0, 5].reshape(2, 4).astype(int))
      [[0 1 0 0]
       [0 0 0 0]]
    """
    return Rowmajor(width, bool(causal), key, proj)
