"""Coordinates on a grid as symbols, and the neighborhood rule along one axis."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

from lowering import ir
from sadsl.maps.symbols import Symbol, Truth, maximum, minimum

Pair: TypeAlias = tuple[Symbol, Symbol]


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of the query and of the key on a grid, as symbols."""

    shape: tuple[int, ...]
    q: Symbol
    k: Symbol

    def unbounded(self, axis: int) -> Pair:
        """``x // inner``: the coordinates on ``axis``, plus multiples of its size.

        ``inner`` is the number of cells in one step along the axis. The multiples come
        from the axes outside of it.
        """
        inner = prod(self.shape[axis + 1 :])
        return (self.q, self.k) if inner == 1 else (self.q // inner, self.k // inner)

    def __getitem__(self, axis: int) -> Pair:
        """The coordinates of query and key on one axis: ``x // inner % size``."""
        size = self.shape[axis]
        if size == 1:
            return Symbol(ir.Const(0)), Symbol(ir.Const(0))
        q, k = self.unbounded(axis)
        outermost = prod(self.shape[:axis]) == 1
        return (q, k) if outermost else (q % size, k % size)

    def equal(self, first: int, last: int) -> Truth:
        """Whether query and key are equal on all axes from ``first`` to ``last``."""
        size = prod(self.shape[first : last + 1])
        if size == 1:
            return Truth(ir.Bool(True))
        q, k = self.unbounded(last)
        outermost = prod(self.shape[:first]) == 1
        return q == k if outermost else (q - k) % size == 0

    def congruent(self, axis: int, modulus: int) -> Truth:
        """Whether the coordinates on one axis are equal modulo ``modulus``."""
        divides = self.shape[axis] % modulus == 0
        q, k = self.unbounded(axis) if divides else self[axis]
        return (q - k) % modulus == 0


@dataclass(frozen=True)
class AxisRule:
    """The neighborhood rule along one axis.

    With coordinates counted within their residue class modulo ``dilation``, of which
    there are ``n``, a query ``i`` sees the keys ``start <= j < start + window``, where
    ``start = clip(i // stride * stride + shift, 0, n - window)``; on a causal axis it
    sees the keys ``start <= j <= i``.
    """

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @cached_property
    def lengths(self) -> set[int]:
        """The sizes of the residue classes modulo ``dilation``."""
        return {self.length // self.dilation, -(-self.length // self.dilation)}

    @property
    def shift(self) -> int:
        """The start of the unclamped window, from the first query of the group."""
        if self.causal:
            return self.stride - self.window
        return self.stride // 2 - self.window // 2

    def terms(self, at: Coordinates, axis: int) -> list[Truth]:
        """The conditions on the coordinates of the axis; all must hold."""
        q, k = at[axis]
        found = [k <= q] if self.causal and self.length > 1 else []
        if self.dilation > 1:
            found.append(at.congruent(axis, self.dilation))
        if self.lengths == {self.window}:
            return found
        # From here on, coordinates are counted within the residue class.
        at_q, at_k = q, k
        if self.dilation > 1:
            at_q, at_k = q // self.dilation, k // self.dilation
        last = max(self._start_of(n - 1) - (n - self.window) for n in self.lengths)
        acts = self.shift < 0 and not self.causal, last > 0
        if not any(acts) and self.stride == self.window and not self.causal:
            return [*found, at_q // self.window == at_k // self.window]
        first = at_q if self.stride == 1 else at_q // self.stride * self.stride
        start = first + self.shift if self.shift else first
        # Keys exist only inside of the axis, so the lower bound needs only the clamp to
        # n - window and the upper bound only the clamp to 0.
        # A causal window ends at the query, which the first condition says.
        low_acts, high_acts = acts
        latest = self._class_length(q) - self.window
        lowest = minimum(start, latest) if high_acts else start
        highest = maximum(start, 0) if low_acts else start
        ends = [] if self.causal else [at_k <= highest + (self.window - 1)]
        return [*found, at_k >= lowest, *ends]

    def _start_of(self, at: int) -> int:
        """The start of the unclamped window of the query ``at``."""
        return at // self.stride * self.stride + self.shift

    def _class_length(self, q: Symbol) -> "Symbol | int":
        """The number of coordinates in the residue class of the query."""
        if self.length % self.dilation == 0:
            return self.length // self.dilation
        return (self.length - 1 - q % self.dilation) // self.dilation + 1
