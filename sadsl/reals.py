"""Numbers as symbols: what the function given to ``bias`` returns."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from lowering import ir, scores


@dataclass(frozen=True, eq=False)
class Real:
    """A number added to a score; ``+ - *`` of numbers and integers are traced."""

    node: scores.Score

    # NumPy must not take the symbol apart: it defers to the operators below.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> "Real":
        return Real(scores.Sum(self.node, score_node(other)))

    def __radd__(self, other: Any) -> "Real":
        return Real(scores.Sum(score_node(other), self.node))

    def __sub__(self, other: Any) -> "Real":
        return self + -1.0 * Real(score_node(other))

    def __rsub__(self, other: Any) -> "Real":
        return other + -1.0 * self

    def __neg__(self) -> "Real":
        return -1.0 * self

    def __mul__(self, other: Any) -> "Real":
        return Real(scores.Product(self.node, score_node(other)))

    def __rmul__(self, other: Any) -> "Real":
        return Real(scores.Product(score_node(other), self.node))

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            f"a traced map takes integers, not `{self!r}`: of numbers, + - and * are "
            "traced, and they can only be added to scores, in a bias"
        )

    __eq__ = __ne__ = __le__ = __lt__ = __ge__ = __gt__ = _refuse  # type: ignore[assignment]
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __abs__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __iter__ = _refuse
    __int__ = __float__ = __index__ = __bool__ = __hash__ = _refuse  # type: ignore[assignment]

    def __repr__(self) -> str:
        return scores.show_score(self.node)


@dataclass(frozen=True)
class TableNumbers:
    """A constant table of floats; ``table((0.5, 0.25))[h]`` looks one up."""

    values: tuple[float, ...]

    def __getitem__(self, index: Any) -> Real:
        return Real(scores.Numbers(self.values, _expr(index)))


@dataclass(frozen=True)
class WeightsArray:
    """A run-time array of floats by name; ``weights("b")[h, q - k]`` looks one up."""

    name: str

    def __getitem__(self, index: Any) -> Real:
        parts = index if isinstance(index, tuple) else (index,)
        return Real(scores.Weights(self.name, tuple(_expr(part) for part in parts)))


def weights(name: str) -> WeightsArray:
    """A run-time array of floats that a bias looks up: learned, or computed before.

    Pass it as ``attention(..., operands={name: array})``: an axis an index, with an
    optional leading batch axis. Gradients reach it. An axis indexed by ``h`` alone may
    have length one, which all heads share; one indexed by the bare ``q`` counts queries
    from the first that is passed, whatever ``q_offset`` is.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"weights({name!r}): the name must be a Python identifier")
    return WeightsArray(name)


def score_node(value: Any) -> scores.Score:
    """The score of a number, an integer of positions or a constant."""
    if isinstance(value, Real):
        return value.node
    node = getattr(value, "node", None)
    return scores.Integer(node) if isinstance(node, ir.Expr) else constant(value)


def constant(value: Any) -> scores.Number:
    """A Python number as a score."""
    return scores.Number(number(value))


def number(value: Any) -> float:
    """A finite Python number as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a bias is made of numbers of positions, not of {value!r}")
    if not math.isfinite(value):
        raise ValueError(
            f"a bias takes finite constants, not {value}: to leave pairs out, use a map"
        )
    return float(value)


def numbers(values: Iterable[float]) -> tuple[float, ...]:
    """Several of them."""
    return tuple(number(value) for value in values)


def _expr(index: Any) -> ir.Expr:
    node = getattr(index, "node", None)
    if isinstance(node, ir.Expr):
        return node
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(
            f"an array is indexed by integers of positions, not by {index!r}"
        )
    return ir.Const(operator.index(index))
