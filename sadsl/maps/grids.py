"""Grids of positions: maps of images, videos and volumes, an axis at a time."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import numpy as np
from typing_extensions import override

from lowering import ir
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.symbols import Symbol, Truth, maximum, minimum

MAX_AXES = 4
PerAxis: TypeAlias = int | tuple[int, ...]
Pair: TypeAlias = tuple[Symbol, Symbol]


@dataclass(frozen=True, init=False, repr=False)
class Grid:
    """Positions are the cells of a grid, row-major: the last axis runs fastest.

    ``Grid(t=8, h=16, w=16)`` names one to four axes from the outermost to the
    innermost. Its methods build index maps that hold of sequences of exactly ``size``
    positions (plus ``extra``, where that is given); other lengths are a ValueError when
    the map is used. Queries may be fewer than keys, as in decoding. ``extra`` positions
    follow the last cell: text beside a video. They see everything, and all see them.

    Raises:
      ValueError: no axis or too many, a size below 1, an axis named ``extra``.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, **sizes: int) -> None:
        if not 1 <= len(sizes) <= MAX_AXES:
            raise ValueError(
                f"Grid of {len(sizes)} axes: name 1 to {MAX_AXES} of them with their "
                "sizes, as in Grid(h=16, w=16)"
            )
        for name, size in sizes.items():
            if not name.isidentifier() or name == "extra":
                raise ValueError(
                    f"Grid: axis {name!r} must be an identifier other than 'extra', "
                    "which counts the positions after the last cell: rename it"
                )
            at_least("Grid", name, size, 1)
        axes = tuple((name, int(size)) for name, size in sizes.items())
        object.__setattr__(self, "axes", axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The axes, outermost first."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        """The number of cells."""
        return prod(self.shape)

    def product(self, *, extra: int = 0, **maps: IndexMap) -> "Product":
        """``product(t=a, h=b)``: ``a`` holds of the t coordinates and ``b`` of the h.

        Axes that are not named are free. In a map of an axis, the number of keys is the
        size of the axis.
        """
        for name, item in maps.items():
            self.index(name, "product")
            if not isinstance(item, IndexMap):
                raise TypeError(f"product: {name}={item!r} must be an index map")
        given = tuple((name, maps[name]) for name in self.names if name in maps)
        return Product(self, extra, given)

    def axial(self, *names: str, extra: int = 0) -> "Axial":
        """Pairs that differ along the named axes at most (Ho et al., Axial attention in
        multidimensional transformers, 2019, section 3).
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
        """Every query sees ``window`` keys along each axis, shifted at the borders.

        Windows are never cut short by a border: they move inside. ``stride`` queries in
        a row share the window of their leader; with ``dilation`` d the rule is applied
        among the coordinates of equal residue modulo d; a ``causal`` axis lets no query
        see beyond its own coordinate. Each is one value for all axes, or a tuple
        (Hassani et al., Neighborhood attention transformer, 2023, section 3; Hassani
        et al., Generalized neighborhood attention, 2025, section 3).

        ``stride=1`` is a sliding window, ``stride == window`` is blocks, and ``window``
        equal to the size of an axis is everything along it. A causal axis with
        ``stride`` above 1 depends on the size of the axis, so that decoding token by
        token is not the same.

        Raises:
          ValueError: not ``1 <= stride <= window``, or ``window * dilation`` beyond the
            axis, or a tuple that has not one entry an axis.
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
        """The place of an axis among the axes."""
        if name not in self.names:
            raise ValueError(
                f"{method}: {name!r} is no axis of {self!r}: name one of "
                f"{', '.join(self.names)}"
            )
        return self.names.index(name)

    def _per_axis(self, name: str, value: Any) -> tuple[Any, ...]:
        """One entry an axis."""
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
    """A map of the cells of a grid, and of ``extra`` positions after them."""

    grid: Grid
    extra: int

    def __post_init__(self) -> None:
        at_least(type(self).__name__.lower(), "extra", self.extra, 0)

    def cells(self, place: "Places") -> list[Truth]:
        """What must hold of two cells."""
        raise NotImplementedError

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        total = self.grid.size + self.extra
        q, k = (Symbol(ir.Within(x.node, total)) for x in (q, k))
        terms = [term.node for term in self.cells(Places(self.grid, q, k))]
        seen = {part for term in terms for part in ir.walk(term)}
        # Where no test reads a side, a comparison with itself still checks its length.
        terms += [(x <= x).node for x in (q, k) if x.node not in seen]
        inside = Truth(terms[0] if len(terms) == 1 else ir.And(tuple(terms)))
        if not self.extra:
            return inside
        return inside | (q >= self.grid.size) | (k >= self.grid.size)

    def _call(self, method: str, *arguments: str) -> str:
        extra = [f"extra={self.extra}"] if self.extra else []
        return f"{self.grid!r}.{method}({', '.join([*arguments, *extra])})"


@dataclass(frozen=True)
class Places:
    """Coordinates of the query and of the key, as symbols."""

    grid: Grid
    q: Symbol
    k: Symbol

    def unbounded(self, axis: int) -> Pair:
        """The coordinates up to multiples of what lies outside of ``axis``."""
        inner = prod(self.grid.shape[axis + 1 :])
        return (self.q, self.k) if inner == 1 else (self.q // inner, self.k // inner)

    def __getitem__(self, axis: int) -> Pair:
        """The coordinates on an axis."""
        size = self.grid.shape[axis]
        if size == 1:
            return Symbol(ir.Const(0)), Symbol(ir.Const(0))
        q, k = self.unbounded(axis)
        outermost = prod(self.grid.shape[:axis]) == 1
        return (q, k) if outermost else (q % size, k % size)

    def equal(self, first: int, last: int) -> Truth:
        """The coordinates on the axes ``first .. last`` are all equal."""
        size = prod(self.grid.shape[first : last + 1])
        if size == 1:
            return Truth(ir.Bool(True))
        q, k = self.unbounded(last)
        outermost = prod(self.grid.shape[:first]) == 1
        return q == k if outermost else (q - k) % size == 0

    def congruent(self, axis: int, modulus: int) -> Truth:
        """The coordinates on an axis are equal modulo ``modulus``."""
        divides = self.grid.shape[axis] % modulus == 0
        q, k = self.unbounded(axis) if divides else self[axis]
        return (q - k) % modulus == 0


@dataclass(frozen=True, repr=False)
class Product(_OnGrid):
    """``grid.product(...)``: one map an axis, all of which must hold."""

    maps: tuple[tuple[str, IndexMap], ...]

    @override
    def cells(self, place: Places) -> list[Truth]:
        return [self._along(name, item, place) for name, item in self.maps]

    def _along(self, name: str, item: IndexMap, place: Places) -> Truth:
        axis = self.grid.index(name, "product")
        q, k = place[axis]
        size = self.grid.shape[axis]
        if self.extra and any(isinstance(x, ir.Table) for x in ir.walk(item.node)):
            # What lies after the last cell must not be looked up outside of a table.
            q, k = q % size, k % size
        length = ir.Const(size)
        new: dict[ir.Axis, ir.Expr] = {"q": q.node, "k": k.node, "n": length}
        return Truth(ir.substitute(item.node, new))

    @override
    def __repr__(self) -> str:
        return self._call("product", *(f"{name}={m!r}" for name, m in self.maps))


@dataclass(frozen=True, repr=False)
class Axial(_OnGrid):
    """``grid.axial(...)``: pairs that differ along the named axes at most."""

    names: tuple[str, ...]

    @override
    def cells(self, place: Places) -> list[Truth]:
        terms = []
        first = None
        # Neighbouring axes that are held fixed are one axis.
        for axis, (name, _) in enumerate((*self.grid.axes, (self.names[0], 0))):
            if name not in self.names:
                first = axis if first is None else first
            elif first is not None:
                terms.append(place.equal(first, axis - 1))
                first = None
        return terms

    @override
    def __repr__(self) -> str:
        return self._call("axial", *map(repr, self.names))


@dataclass(frozen=True)
class _Rule:
    """The neighbourhood rule along one axis."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @cached_property
    def lengths(self) -> set[int]:
        """How many coordinates the residue classes have."""
        return {self.length // self.dilation, -(-self.length // self.dilation)}

    @property
    def shift(self) -> int:
        """From the first query of a group to the start of its unclamped window."""
        if self.causal:
            return self.stride - self.window
        return self.stride // 2 - self.window // 2

    def terms(self, place: Places, axis: int) -> list[Truth]:
        """What must hold of the coordinates on the axis."""
        q, k = place[axis]
        found = [k <= q] if self.causal and self.length > 1 else []
        if self.dilation > 1:
            found.append(place.congruent(axis, self.dilation))
        if self.lengths == {self.window}:
            return found
        # From here on, coordinates count within the residue class.
        at_q, at_k = q, k
        if self.dilation > 1:
            at_q, at_k = q // self.dilation, k // self.dilation
        last = max(self._start_of(n - 1) - (n - self.window) for n in self.lengths)
        acts = self.shift < 0 and not self.causal, last > 0
        if not any(acts) and self.stride == self.window and not self.causal:
            return [*found, at_q // self.window == at_k // self.window]
        first = at_q if self.stride == 1 else at_q // self.stride * self.stride
        start = first + self.shift if self.shift else first
        # Each side needs the one clamp that keys inside of the axis do not make for it,
        # and a causal window ends at the query.
        low_acts, high_acts = acts
        latest = self._class_length(q) - self.window
        lowest = minimum(start, latest) if high_acts else start
        highest = maximum(start, 0) if low_acts else start
        ends = [] if self.causal else [at_k <= highest + (self.window - 1)]
        return [*found, at_k >= lowest, *ends]

    def _start_of(self, at: int) -> int:
        return at // self.stride * self.stride + self.shift

    def _class_length(self, q: Symbol) -> "Symbol | int":
        if self.length % self.dilation == 0:
            return self.length // self.dilation
        return (self.length - 1 - q % self.dilation) // self.dilation + 1


@dataclass(frozen=True, repr=False)
class Neighborhood(_OnGrid):
    """``grid.neighborhood(...)``; every rule is a tuple with one entry an axis."""

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
    def rules(self) -> tuple[_Rule, ...]:
        """The rule of every axis."""
        fields = (self.grid.shape, self.window, self.stride, self.dilation, self.causal)
        return tuple(_Rule(*entry) for entry in zip(*fields, strict=True))

    @override
    def cells(self, place: Places) -> list[Truth]:
        each = [rule.terms(place, axis) for axis, rule in enumerate(self.rules)]
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
    """One value if all are equal, else the tuple."""
    return repr(values[0] if len(set(values)) == 1 else values)
