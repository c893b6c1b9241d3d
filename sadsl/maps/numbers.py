"""Floats as symbols: what the function given to ``bias`` returns."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowering import ir
from lowering.bias import nodes
from sadsl.maps.operand_names import check_operand_name
from sadsl.maps.traced import NotTraced, TracedValue, integer


@dataclass(frozen=True, eq=False, repr=False)
class Real(TracedValue):
    """A float that is added to a score; ``+``, ``-`` and ``*`` are traced."""

    node: nodes.Score

    way_out: ClassVar[str] = (
        "a traced map takes integers; floats are traced through +, - and *, and can "
        "only be added to scores: use them in a bias"
    )

    def __add__(self, other: Any) -> "Real":
        return Real(nodes.Sum(self.node, score_node(other)))

    def __radd__(self, other: Any) -> "Real":
        return Real(nodes.Sum(score_node(other), self.node))

    def __sub__(self, other: Any) -> "Real":
        return Real(nodes.Sum(self.node, _negative(score_node(other))))

    def __rsub__(self, other: Any) -> "Real":
        return other + -self

    def __neg__(self) -> "Real":
        return Real(_negative(self.node))

    def __mul__(self, other: Any) -> "Real":
        return Real(nodes.ScoreProduct(self.node, score_node(other)))

    def __rmul__(self, other: Any) -> "Real":
        return Real(nodes.ScoreProduct(score_node(other), self.node))

    def __pos__(self) -> "Real":
        return self

    def __repr__(self) -> str:
        return nodes.show_score(self.node)


@dataclass(frozen=True, eq=False)
class TableNumbers(TracedValue):
    """A constant table of floats, indexed as ``table((0.5, 0.25))[h]``."""

    values: tuple[float, ...]

    way_out: ClassVar[str] = "look up a number of the table, as in table(values)[h]"

    def __getitem__(self, index: Any) -> Real:
        return Real(nodes.Numbers(self.values, _expr(index)))


@dataclass(frozen=True, eq=False)
class WeightsArray(TracedValue):
    """A named run-time array of floats, indexed as ``weights("b")[h, q - k]``."""

    name: str

    way_out: ClassVar[str] = "look up a number of the array, as in weights(name)[h, q]"

    def __getitem__(self, index: Any) -> Real:
        parts = index if isinstance(index, tuple) else (index,)
        return Real(nodes.Weights(self.name, tuple(_expr(part) for part in parts)))


def weights(name: str) -> WeightsArray:
    """A run-time array of floats for a bias: learned weights, or values of the caller.

    Pass the array as ``attention(..., operands={name: array})``: it has one axis for
    each index, and perhaps a batch axis in front. Gradients flow to it. An axis indexed
    by ``h`` alone may have length 1: all heads share it. An axis indexed by ``q`` alone
    counts queries from the first one passed, whatever ``q_offset`` is.

    Args:
      name: the name of the operand, a Python identifier.

    Raises:
      ValueError: the name is not a Python identifier.

    Example:
      >>> import sadsl as sa
      >>> sa.bias(lambda q, k, h: sa.weights("slope")[h] * (q - k))
      bias(lambda q, k, h: weights('slope')[h] * (q - k))
    """
    check_operand_name("weights: name", name)
    return WeightsArray(name)


def log(x: Any) -> Real:
    """The natural logarithm of an integer of positions, for ``bias`` and ``scale=``.

    It is 0 where the integer is below 1.

    Example:
      >>> import sadsl as sa
      >>> sa.bias(lambda q, k, h: 1 + 0.1 * sa.log(1 + (q + 1) // 8192))
      bias(lambda q, k, h: 1.0 + (0.1 * log(1 + (q + 1) // 8192)))
    """
    return Real(nodes.Log(_expr(x)))


def score_node(value: Any) -> nodes.Score:
    """The score of a traced float, a traced integer or a constant."""
    if isinstance(value, Real):
        return value.node
    node = getattr(value, "node", None)
    return nodes.Integer(node) if isinstance(node, ir.Expr) else constant(value)


def _negative(score: nodes.Score) -> nodes.Score:
    # Not `-1.0 * 0.5`: Python would read that text as one constant.
    if isinstance(score, nodes.Number):
        return nodes.Number(-score.value)
    return nodes.ScoreProduct(nodes.Number(-1.0), score)


def constant(value: Any) -> nodes.Number:
    """A Python number as a score."""
    return nodes.Number(number(value))


def number(value: Any) -> float:
    """A finite constant as a float.

    Raises:
      TypeError: it is not a number.
      ValueError: it is infinite or NaN.
    """
    known = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, known):
        raise NotTraced(
            f"a bias is made of constants and numbers of positions, not of {value!r}: "
            "write float(x) for a constant, table(values)[h] for constants by head or "
            "position, or weights(name)[h, q] for an array that is passed as operands="
            "{name: array}"
        )
    if not math.isfinite(value):
        raise ValueError(
            f"a bias takes finite constants, not {value}: to exclude pairs, use a map"
        )
    return float(value)


def numbers(values: Iterable[float]) -> tuple[float, ...]:
    """Finite constants as a tuple of floats."""
    return tuple(number(value) for value in values)


def _expr(index: Any) -> ir.Expr:
    node = getattr(index, "node", None)
    if isinstance(node, ir.Expr):
        return node
    return ir.Const(integer(index, "[...]"))
