"""The maps over a sequence that have a name: ``causal``, ``window``, ``blocks``, ...

Pictures in the docstrings have a row a query and a column a key; ``#`` is a pair in
the map. A size that is not an integer is a ``TypeError``, one too small a
``ValueError``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from typing_extensions import override

from lowering.expr.printing import show_set
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.from_jax import called
from sadsl.maps.symbols import POSITIONS, Symbol, Truth, operand
from sadsl.maps.traced import bound
from sadsl.maps.traced_map import Where, traced_map


@dataclass(frozen=True, repr=False)
class _Named(IndexMap):
    """A map whose repr calls the function of its name in lower case."""

    @override
    def __repr__(self) -> str:
        return call_text(self, by_position=len(fields(self)))


@dataclass(frozen=True, repr=False)
class Full(_Named):
    """Every pair."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> bool:
        return True


@dataclass(frozen=True, repr=False)
class Causal(_Named):
    """``k <= q``."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return k <= q


@dataclass(frozen=True, repr=False)
class Window(_Named):
    """``q - left <= k <= q + right``."""

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        at_least("window", "left", self.left, 0)
        at_least("window", "right", self.right, 0)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return (q - k <= self.left) & (k - q <= self.right)


@dataclass(frozen=True, repr=False)
class Sinks(_Named):
    """``k < n``."""

    n: int

    def __post_init__(self) -> None:
        at_least("sinks", "n", self.n, 0)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return k < self.n


@dataclass(frozen=True, repr=False)
class Keys(_Named):
    """``start <= k < stop``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        at_least("keys", "start", self.start, 0)
        at_least("keys", "stop", self.stop, self.start)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return (k >= self.start) & (k < self.stop)


@dataclass(frozen=True, repr=False)
class Queries(_Named):
    """``start <= q < stop``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        at_least("queries", "start", self.start, 0)
        at_least("queries", "stop", self.stop, self.start)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return (q >= self.start) & (q < self.stop)


@dataclass(frozen=True, repr=False)
class Strided(_Named):
    """``(q - k) % stride == 0``."""

    stride: int

    def __post_init__(self) -> None:
        at_least("strided", "stride", self.stride, 1)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return (q - k) % self.stride == 0


@dataclass(frozen=True, repr=False)
class Dilated(_Named):
    """Every ``dilation``-th key: ``left`` of them before the query, ``right`` after."""

    left: int
    right: int
    dilation: int

    def __post_init__(self) -> None:
        at_least("dilated", "left", self.left, 0)
        at_least("dilated", "right", self.right, 0)
        at_least("dilated", "dilation", self.dilation, 1)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        near = (q - k <= self.left * self.dilation) & (
            k - q <= self.right * self.dilation
        )
        return near & ((q - k) % self.dilation == 0)


@dataclass(frozen=True, repr=False)
class Blocks(_Named):
    """``q // size == k // size``."""

    size: int

    def __post_init__(self) -> None:
        at_least("blocks", "size", self.size, 1)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return q // self.size == k // self.size


@dataclass(frozen=True, repr=False)
class Offsets(_Named):
    """``q - k`` is one of ``values``, which are sorted."""

    values: tuple[int, ...]

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return (q - k).isin(self.values)

    @override
    def __repr__(self) -> str:
        return f"offsets({show_set(self.values)})"


@dataclass(frozen=True, repr=False)
class Segments(_Named):
    """``q_segment_ids[q] == kv_segment_ids[k]``."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return operand("q_segment_ids")[q] == operand("kv_segment_ids")[k]


def full() -> Full:
    """Every query sees every key.

    Example:
      >>> import sadsl as sa
      >>> print(sa.full().picture(2))
      ##
      ##
    """
    return Full()


def causal() -> Causal:
    """A query sees the keys up to its own position: ``k <= q``.

    Example:
      >>> import sadsl as sa
      >>> print(sa.causal().picture(4))
      #...
      ##..
      ###.
      ####
    """
    return Causal()


def window(left: int, right: int = 0) -> Window:
    """A query sees the keys near to it: ``q - left <= k <= q + right``.

    Args:
      left: keys before the query, at least 0.
      right: keys after the query, at least 0.

    Example:
      >>> import sadsl as sa
      >>> print(sa.window(1).picture(4))
      #...
      ##..
      .##.
      ..##
    """
    return Window(left, right)


def sinks(n: int) -> Sinks:
    """Every query sees the first ``n`` keys (Xiao et al., StreamingLLM, 2023).

    Example:
      >>> import sadsl as sa
      >>> print(sa.sinks(1).picture(2, 4))
      #...
      #...
    """
    return Sinks(n)


def prefix(n: int) -> Sinks:
    """Every query sees a prefix of ``n`` keys; another name of ``sinks(n)``.

    Example:
      >>> import sadsl as sa
      >>> sa.prefix(3)
      sinks(3)
    """
    return Sinks(n)


def keys(start: int, stop: int) -> Keys:
    """Every query sees the keys ``start <= k < stop``.

    Example:
      >>> import sadsl as sa
      >>> print(sa.keys(1, 3).picture(2, 4))
      .##.
      .##.
    """
    return Keys(start, stop)


def queries(start: int, stop: int) -> Queries:
    """The queries ``start <= q < stop`` see every key; other queries see none.

    Example:
      >>> import sadsl as sa
      >>> print(sa.queries(0, 1).picture(2))
      ##
      ..
    """
    return Queries(start, stop)


def strided(stride: int) -> Strided:
    """A query sees every ``stride``-th key: ``(q - k) % stride == 0``.

    Child et al., Sparse Transformer, 2019, section 4.2.

    Example:
      >>> import sadsl as sa
      >>> print(sa.strided(2).picture(4))
      #.#.
      .#.#
      #.#.
      .#.#
    """
    return Strided(stride)


def dilated(left: int, right: int, dilation: int) -> Dilated:
    """A query sees every ``dilation``-th key near to it.

    Beltagy et al., Longformer, 2020, section 3.1.

    Args:
      left: how many of those keys are before the query, at least 0.
      right: how many of them are after the query, at least 0.
      dilation: the distance from one of them to the next, at least 1.

    Example:
      >>> import sadsl as sa
      >>> print(sa.dilated(1, 0, dilation=2).picture(4))
      #...
      .#..
      #.#.
      .#.#
    """
    return Dilated(left, right, dilation)


def blocks(size: int) -> Blocks:
    """A query sees the keys of its own block: ``q // size == k // size``.

    Example:
      >>> import sadsl as sa
      >>> print(sa.blocks(2).picture(4))
      ##..
      ##..
      ..##
      ..##
    """
    return Blocks(size)


def offsets(values: Iterable[int]) -> Offsets:
    """A query sees the keys at some distances before it: ``q - k`` is in ``values``.

    Args:
      values: distances; a negative one is that of a key after the query.

    Raises:
      TypeError: a value is not an integer.

    Example:
      >>> import sadsl as sa
      >>> print(sa.offsets({0, 2}).picture(4))
      #...
      .#..
      #.#.
      .#.#
    """
    found = tuple(values)
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"offsets: {value!r} must be an integer")
    return Offsets(tuple(sorted({int(v) for v in found})))


def segments() -> Segments:
    """A query sees the keys of its own document, where a row packs several documents.

    The condition is ``q_segment_ids[q] == kv_segment_ids[k]``. The ids are passed to
    the call: ``attention(..., q_segment_ids=, kv_segment_ids=)``, int32 ``[batch,
    seq]``. New ids do not recompile.

    Example:
      >>> import sadsl as sa
      >>> import numpy as np
      >>> ids = {f"{side}_segment_ids": np.array([0, 0, 1]) for side in ("q", "kv")}
      >>> print(sa.segments().dense(3, operands=ids)[0].astype(int))
      [[1 1 0]
       [1 1 0]
       [0 0 1]]
    """
    return Segments()


def where(function: Callable[..., Any]) -> Where:
    """A query sees the keys for which ``function`` returns true.

    Args:
      function: a function of the positions ``(q, k)``, or also of the head,
        ``(q, k, h)``, or also of the number of keys, ``(q, k, h, n)``. A parameter with
        a default keeps it, as in ``lambda q, k, d=d: ...``. It is called once, on
        symbols: ``sadsl.maps.symbols.Symbol`` lists what can be traced. A function of
        ``jax.numpy`` is called once more, by jax.

    Raises:
      TypeError: the function branches on a symbol, or uses another operation.

    Example:
      >>> import sadsl as sa
      >>> even = sa.where(lambda q, k: (q + k) % 2 == 0)
      >>> print((sa.causal() & even).picture(3))
      #..
      .#.
      #.#
    """
    symbols = [POSITIONS[x] for x in bound(function, "where", tuple(POSITIONS))]
    return traced_map(called(function, symbols, "the function of where"))
