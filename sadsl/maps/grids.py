"""Defines ``Grid``: maps of images, videos and volumes, built from their axes."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import numpy as np
from typing_extensions import override

from lowering import ir
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.grid_coordinates import AxisRule, Coordinates
from sadsl.maps.symbols import Symbol, Truth

MAX_AXES = 4
PerAxis: TypeAlias = int | tuple[int, ...]


@dataclass(frozen=True, init=False, repr=False)
class Grid:
    """A grid whose cells are the positions, row-major: the last axis is fastest.

    ``Grid(t=8, h=16, w=16)`` names one to four axes, the outermost first. The methods
    build index maps for sequences of exactly ``size`` positions, plus ``extra`` where
    that is given; a map raises a ``ValueError`` if it is used with another length.
    Queries may be fewer than keys, as in decoding. The ``extra`` positions follow the
    last cell, as text beside a video does: they see every key, and every query sees
    them.

    Args:
      **sizes: the number of cells along each axis, at least 1.

    Raises:
      ValueError: no axis or more than four, a size below 1, or an axis named ``extra``.

    Example:
      >>> import sadsl as sa
      >>> grid = sa.Grid(h=2, w=3)
      >>> grid.size
      6
      >>> print(grid.axial("h").picture(6))  # cells of the same column
      #..#..
      .#..#.
      ..#..#
      #..#..
      .#..#.
      ..#..#
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, **sizes: int) -> None:
        if not 1 <= len(sizes) <= MAX_AXES:
            raise ValueError(
                f"Grid of {len(sizes)} axes: name 1 to {MAX_AXES} of them with their "
                "sizes, as in Grid(h=16, w=16)"
            )
        for name, size in sizes.items():
            if not ir.is_name(name) or name == "extra":
                raise ValueError(
                    f"Grid: axis {name!r} must be an identifier other than 'extra', "
                    "which counts the positions after the last cell: rename it"
                )
            at_least("Grid", name, size, 1)
        axes = tuple((name, int(size)) for name, size in sizes.items())
        object.__setattr__(self, "axes", axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, outermost first."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes, outermost first."""
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        """The number of cells."""
        return prod(self.shape)

    def product(self, *, extra: int = 0, **maps: IndexMap) -> "Product":
        """Combines one map for each axis; a pair must be in all of them.

        ``product(t=a, h=b)`` has the pairs whose t coordinates are in ``a`` and whose
        h coordinates are in ``b``. Axes that are not named are unrestricted.

        Args:
          extra: positions after the last cell.
          **maps: the map of each named axis, of coordinates; the number of keys that it
            may read is the size of the axis.

        Raises:
          ValueError: a name is not an axis.
          TypeError: a value is not an index map.

        Example:
          >>> import sadsl as sa
          >>> print(sa.Grid(t=2, w=2).product(t=sa.causal()).picture(4))
          ##..
          ##..
          ####
          ####
        """
        for name, item in maps.items():
            self.index(name, "product")
            if not isinstance(item, IndexMap):
                raise TypeError(f"product: {name}={item!r} must be an index map")
        given = tuple((name, maps[name]) for name in self.names if name in maps)
        return Product(self, extra, given)

    def axial(self, *names: str, extra: int = 0) -> "Axial":
        """A query sees the keys whose coordinates on all other axes are its own.

        Ho et al., Axial attention in multidimensional transformers, 2019, section 3.

        Args:
          *names: the axes along which query and key may differ.
          extra: positions after the last cell.

        Raises:
          ValueError: no name is given, or a name is not an axis.

        Example:
          >>> import sadsl as sa
          >>> print(sa.Grid(h=2, w=2).axial("w").picture(4))
          ##..
          ##..
          ..##
          ..##
        """
        if not names:
            raise ValueError(
                f"axial() needs at least one of the axes {', '.join(self.names)}: "
                f"write axial({self.names[-1]!r})"
            )
        for name in names:
            self.index(name, "axial")
        return Axial(self, extra, tuple(n for n in self.names if n in names))

    def neighborhood(
        self,
        window: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        causal: bool | tuple[bool, ...] = False,
        extra: int = 0,
    ) -> "Neighborhood":
        """Every query sees a window of keys around it along each axis.

        A border never cuts a window short: the window moves inside. ``stride=1`` is a
        sliding window, ``stride == window`` is blocks, and a ``window`` equal to the
        size of an axis is everything along it. Hassani et al., Neighborhood attention
        transformer, 2023, section 3; Hassani et al., Generalized neighborhood
        attention, 2025, section 3.

        A causal axis with ``stride`` above 1 depends on the size of the axis, so that
        decoding token by token gives other results.

        Args:
          window: keys along an axis. Each argument but ``extra`` is one value for all
            axes, or a tuple with one entry an axis.
          stride: queries in a row that share the window of their leader.
          dilation: d > 1 applies the rule among coordinates equal modulo d.
          causal: whether a query sees no key beyond its own coordinate.
          extra: positions after the last cell.

        Raises:
          ValueError: not ``1 <= stride <= window``, or ``window * dilation`` exceeds
            the axis, or a tuple does not have one entry an axis.
          TypeError: a size is not an integer, or ``causal`` is not a bool.

        Example:
          >>> import sadsl as sa
          >>> print(sa.Grid(w=5).neighborhood(3).picture(5))
          ###..
          ###..
          .###.
          ..###
          ..###
        """
        rules = {"window": window, "stride": stride, "dilation": dilation}
        found = {name: self._per_axis(name, value) for name, value in rules.items()}
        for name, values in found.items():
            for axis, value in zip(self.names, values, strict=True):
                at_least("neighborhood", f"{name} of axis {axis}", value, 1)
        directions = self._per_axis("causal", causal)
        for axis, value in zip(self.names, directions, strict=True):
            if not isinstance(value, bool | np.bool_):
                raise TypeError(
                    f"neighborhood: causal of axis {axis}={value!r} must be True or "
                    "False"
                )
        numbers = (tuple(map(int, values)) for values in found.values())
        return Neighborhood(self, extra, *numbers, causal=tuple(map(bool, directions)))

    def index(self, name: str, method: str) -> int:
        """The number of an axis, counted from the outermost."""
        if name not in self.names:
            raise ValueError(
                f"{method}: {name!r} is not an axis of {self!r}: name one of "
                f"{', '.join(self.names)}"
            )
        return self.names.index(name)

    def _per_axis(self, name: str, value: Any) -> tuple[Any, ...]:
        """The argument ``name`` of ``neighborhood`` as a tuple, one entry an axis."""
        several = isinstance(value, tuple | list)
        values = tuple(value) if several else (value,) * len(self.axes)
        if len(values) != len(self.axes):
            raise ValueError(
                f"neighborhood: {name}={value} has {len(values)} entries, but the grid "
                f"has {len(self.axes)} axes ({', '.join(self.names)}): give one entry "
                "an axis, or one value for all"
            )
        return values

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{name}={size}' for name, size in self.axes)})"


@dataclass(frozen=True, repr=False)
class _OnGrid(IndexMap):
    """A map over the cells of a grid and ``extra`` positions after them."""

    grid: Grid
    extra: int

    def __post_init__(self) -> None:
        at_least(type(self).__name__.lower(), "extra", self.extra, 0)

    def cells(self, at: Coordinates) -> list[Truth]:
        """The conditions under which one cell sees another; all must hold."""
        raise NotImplementedError

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        total = self.grid.size + self.extra
        q, k = (Symbol(ir.Within(x.node, total)) for x in (q, k))
        terms = [term.node for term in self.cells(Coordinates(self.grid.shape, q, k))]
        seen = {part for term in terms for part in ir.walk(term)}
        # Where no condition reads q (or k), `q <= q` makes the length checked anyway.
        terms += [(x <= x).node for x in (q, k) if x.node not in seen]
        inside = Truth(terms[0] if len(terms) == 1 else ir.And(tuple(terms)))
        if not self.extra:
            return inside
        return inside | (q >= self.grid.size) | (k >= self.grid.size)

    def _call(self, method: str, *arguments: str) -> str:
        extra = [f"extra={self.extra}"] if self.extra else []
        return f"{self.grid!r}.{method}({', '.join([*arguments, *extra])})"


@dataclass(frozen=True, repr=False)
class Product(_OnGrid):
    """``grid.product(...)``: a pair must be in the maps of all axes."""

    maps: tuple[tuple[str, IndexMap], ...]

    @override
    def cells(self, at: Coordinates) -> list[Truth]:
        return [self._along(name, item, at) for name, item in self.maps]

    def _along(self, name: str, item: IndexMap, at: Coordinates) -> Truth:
        axis = self.grid.index(name, "product")
        q, k = at[axis]
        size = self.grid.shape[axis]
        if self.extra and any(isinstance(x, ir.Table) for x in ir.walk(item.node)):
            # An extra position must not be looked up outside of a table.
            q, k = q % size, k % size
        length = ir.Const(size)
        new: dict[ir.Axis, ir.Expr] = {"q": q.node, "k": k.node, "n": length}
        return Truth(ir.substitute(item.node, new))

    @override
    def __repr__(self) -> str:
        return self._call("product", *(f"{name}={m!r}" for name, m in self.maps))


@dataclass(frozen=True, repr=False)
class Axial(_OnGrid):
    """``grid.axial(...)``: query and key differ at most along the named axes."""

    names: tuple[str, ...]

    @override
    def cells(self, at: Coordinates) -> list[Truth]:
        terms = []
        first = None
        # Neighbouring axes that are not named are compared as one axis. The last entry
        # of the loop closes the last group.
        for axis, (name, _) in enumerate((*self.grid.axes, (self.names[0], 0))):
            if name not in self.names:
                first = axis if first is None else first
            elif first is not None:
                terms.append(at.equal(first, axis - 1))
                first = None
        return terms

    @override
    def __repr__(self) -> str:
        return self._call("axial", *map(repr, self.names))


@dataclass(frozen=True, repr=False)
class Neighborhood(_OnGrid):
    """``grid.neighborhood(...)``; every field is a tuple with one entry an axis."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule in zip(self.grid.names, self.rules, strict=True):
            if rule.window * rule.dilation > rule.length:
                most = rule.length // rule.dilation
                way_out = f"a window of at most {most}" if most else "less dilation"
                raise ValueError(
                    f"neighborhood: window {rule.window} times dilation "
                    f"{rule.dilation} on axis {name} must fit its {rule.length} cells: "
                    f"give {way_out}"
                )
            if rule.stride > rule.window:
                raise ValueError(
                    f"neighborhood: stride {rule.stride} on axis {name} must be at "
                    f"most its window {rule.window}, or queries miss their own window"
                )

    @cached_property
    def rules(self) -> tuple[AxisRule, ...]:
        """The rule of every axis."""
        fields = (self.grid.shape, self.window, self.stride, self.dilation, self.causal)
        return tuple(AxisRule(*entry) for entry in zip(*fields, strict=True))

    @override
    def cells(self, at: Coordinates) -> list[Truth]:
        each = [rule.terms(at, axis) for axis, rule in enumerate(self.rules)]
        return [term for terms in each for term in terms]

    @override
    def __repr__(self) -> str:
        options = [
            f"{name}={_short(values)}"
            for name in ("stride", "dilation", "causal")
            if _short(values := getattr(self, name)) not in ("1", "False")
        ]
        return self._call("neighborhood", _short(self.window), *options)


def _short(values: tuple) -> str:
    """The text of the tuple, or of its one value if all entries are equal."""
    return repr(values[0] if len(set(values)) == 1 else values)
