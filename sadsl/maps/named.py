"""The named one-dimensional maps.

Pictures in the docstrings show queries downwards and keys to the right, ``#`` = seen.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from typing_extensions import override

from lowering import ir
from lowering.expr.printing import show, show_set
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.symbols import POSITIONS, Symbol, Truth, operand, truth_node
from sadsl.maps.traced import bound, tracing


@dataclass(frozen=True, repr=False)
class _Named(IndexMap):
    """A map whose repr is a call of the lower-case function of the same name."""

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
    """``q - k`` is one of ``values``, which ascend."""

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


@dataclass(frozen=True, repr=False)
class Where(IndexMap):
    """A traced expression; made by ``where``."""

    traced: ir.Pred

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(self.traced)

    @override
    def __repr__(self) -> str:
        axes = ir.axes(self.traced)
        names = "q, k, h" if "h" in axes else "q, k"
        names = "q, k, h, n" if "n" in axes else names
        return f"where(lambda {names}: {show(self.traced)})"


def full() -> Full:
    """Every query sees every key.

    ::

        ####
        ####
        ####
        ####
    """
    return Full()


def causal() -> Causal:
    """A query sees the keys up to its own position: ``k <= q``.

    ::

        #...
        ##..
        ###.
        ####
    """
    return Causal()


def window(left: int, right: int = 0) -> Window:
    """``q - left <= k <= q + right``; ``window(1)``:

    ::

        #...
        ##..
        .##.
        ..##
    """
    return Window(left, right)


def sinks(n: int) -> Sinks:
    """All see the first ``n`` keys (Xiao et al., StreamingLLM, 2023); ``sinks(1)``:

    ::

        #...
        #...
        #...
        #...
    """
    return Sinks(n)


def prefix(n: int) -> Sinks:
    """``sinks(n)`` by its other name: a prefix that everyone sees."""
    return Sinks(n)


def keys(start: int, stop: int) -> Keys:
    """Everyone sees the keys ``start <= k < stop``; ``keys(1, 3)``:

    ::

        .##.
        .##.
        .##.
        .##.
    """
    return Keys(start, stop)


def queries(start: int, stop: int) -> Queries:
    """The queries ``start <= q < stop`` see everything; ``queries(1, 2)``:

    ::

        ....
        ####
        ....
        ....
    """
    return Queries(start, stop)


def strided(stride: int) -> Strided:
    """``(q - k) % stride == 0`` (Child et al., Sparse Transformer, 2019, section 4.2).

    ``strided(2)``::

        #.#.
        .#.#
        #.#.
        .#.#
    """
    return Strided(stride)


def dilated(left: int, right: int, dilation: int) -> Dilated:
    """Every ``dilation``-th key, ``left`` of them before and ``right`` after the query.

    (Beltagy et al., Longformer, 2020, section 3.1.) ``dilated(1, 0, 2)``::

        #...
        .#..
        #.#.
        .#.#
    """
    return Dilated(left, right, dilation)


def blocks(size: int) -> Blocks:
    """``q // size == k // size``; ``blocks(2)``:

    ::

        ##..
        ##..
        ..##
        ..##
    """
    return Blocks(size)


def offsets(values: Iterable[int]) -> Offsets:
    """``q - k`` is one of ``values``; ``offsets({0, 2})``:

    ::

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
    """Packed documents: attend iff ``q_segment_ids[q] == kv_segment_ids[k]``.

    The ids are passed at run time (``attention(..., q_segment_ids=, kv_segment_ids=)``,
    int32 ``[batch, seq]``); new ids do not recompile. With ids 0 0 1 1::

        ##..
        ##..
        ..##
        ..##
    """
    return Segments()


def where(function: Callable[..., Any]) -> Where:
    """The pairs for which ``function`` holds.

    It takes the positions ``(q, k)``, perhaps the head as well, ``(q, k, h)``, and
    perhaps the number of keys, ``(q, k, h, n)``. A parameter with a default keeps it,
    as in ``lambda q, k, d=d: ...``. It is called once, on symbols: see
    ``sadsl.maps.symbols.Symbol`` for what can be traced.

    ``where(lambda q, k: (q + k) % 2 == 0)``::

        #.#.
        .#.#
        #.#.
        .#.#

    Raises:
      TypeError: it branches on a symbol, or uses what cannot be traced.
    """
    names = bound(function, "where", tuple(POSITIONS))
    with tracing("the function of where"):
        return traced_map(function(*(POSITIONS[name] for name in names)))


def traced_map(value: Truth | bool) -> Where:
    """The map of a traced expression."""
    return Where(truth_node(value))
