"""What ``where`` and ``bias`` are traced on: integers and truths as symbols."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn, TypeAlias

from lowering import ir, scores
from lowering.printing import show
from sadsl.reals import Real, TableNumbers, number

Integer: TypeAlias = "Symbol | OperandArray | int"


def _or_real(method: Callable) -> Callable:
    """``method`` of integers; with a float on the other side, that of numbers."""

    @wraps(method)
    def either(self: "Symbol", other: Any) -> Any:
        if isinstance(other, float | Real):
            return getattr(Real(scores.Integer(self.node)), method.__name__)(other)
        return method(self, other)

    return either


@dataclass(frozen=True, eq=False)
class Symbol:
    """An integer that stands for a position, a head, or what is computed from them.

    ``+ - *`` (by constants), ``//`` and ``%`` (by positive constants), comparisons,
    ``abs``, ``minimum``, ``maximum``, ``floor_log2``, ``power_of_two``, ``isin`` and
    ``table`` are traced; comparisons yield a ``Truth``.
    """

    node: ir.Expr

    # NumPy must not take the symbol apart: it defers to the operators below.
    __array_ufunc__ = None

    @_or_real
    def __add__(self, other: Integer) -> "Symbol":
        return Symbol(ir.Add(self.node, as_node(other, "+")))

    @_or_real
    def __radd__(self, other: Integer) -> "Symbol":
        return Symbol(ir.Add(as_node(other, "+"), self.node))

    @_or_real
    def __sub__(self, other: Integer) -> "Symbol":
        right = as_node(other, "-")
        if isinstance(right, ir.Const):
            return Symbol(ir.Add(self.node, ir.Const(-right.value)))
        return Symbol(ir.Add(self.node, ir.Mul(right, -1)))

    @_or_real
    def __rsub__(self, other: Integer) -> "Symbol":
        return Symbol(ir.Add(as_node(other, "-"), ir.Mul(self.node, -1)))

    def __neg__(self) -> "Symbol":
        return Symbol(ir.Mul(self.node, -1))

    def __abs__(self) -> "Symbol":
        return maximum(self, -self)

    @_or_real
    def __mul__(self, other: int) -> "Symbol":
        return Symbol(ir.Mul(self.node, constant(other, "*")))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> "Symbol":
        return Symbol(ir.FloorDiv(self.node, positive(constant(other, "//"), "//")))

    def __mod__(self, other: int) -> "Symbol":
        return Symbol(ir.Mod(self.node, positive(constant(other, "%"), "%")))

    def __le__(self, other: Integer) -> "Truth":
        return Truth(ir.Le(self.node, as_node(other, "<=")))

    def __ge__(self, other: Integer) -> "Truth":
        return Truth(ir.Le(as_node(other, ">="), self.node))

    def __lt__(self, other: Integer) -> "Truth":
        right = as_node(other, "<")
        if isinstance(right, ir.Const):
            return Truth(ir.Le(self.node, ir.Const(right.value - 1)))
        return Truth(ir.Le(ir.Add(self.node, ir.Const(1)), right))

    def __gt__(self, other: Integer) -> "Truth":
        left = as_node(other, ">")
        if isinstance(left, ir.Const):
            return Truth(ir.Le(ir.Const(left.value + 1), self.node))
        return Truth(ir.Le(ir.Add(left, ir.Const(1)), self.node))

    def __eq__(self, other: object) -> "Truth":  # type: ignore[override]
        return Truth(ir.Eq(self.node, as_node(other, "==")))

    def __ne__(self, other: object) -> "Truth":  # type: ignore[override]
        return ~(self == other)

    def isin(self, values: Iterable[int]) -> "Truth":
        """Whether this is one of ``values``."""
        return isin(self, values)

    def __hash__(self) -> int:
        raise TypeError(
            "a position cannot be looked up in a set or a dict while it is traced: "
            "write isin(q - k, {1, 2, 4}) or table(values)[q]"
        )

    def __bool__(self) -> bool:
        raise TypeError(
            f"cannot branch on `{self!r}`: a map is traced once for all pairs; write "
            "`a & b`, `a | b`, `~a`, minimum(a, b) or maximum(a, b) instead of "
            "`and`, `or`, `not`, `if`, min, max or chained comparisons"
        )

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            f"cannot trace this operation on `{self!r}`: traced are + - and * by "
            "constants, // and % by positive constants, comparisons, abs, minimum, "
            "maximum, floor_log2, power_of_two, isin, table and operand"
        )

    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __rfloordiv__ = __rmod__ = __matmul__ = __rmatmul__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rshift__ = __invert__ = __iter__ = _refuse
    __int__ = __float__ = __index__ = __round__ = _refuse

    def __repr__(self) -> str:
        return show(self.node)


@dataclass(frozen=True, eq=False)
class Truth:
    """A predicate of positions; ``& | ~`` combine it."""

    node: ir.Pred

    __array_ufunc__ = None

    def __and__(self, other: "Truth | bool") -> "Truth":
        return Truth(ir.And((self.node, truth_node(other))))

    def __rand__(self, other: bool) -> "Truth":
        return Truth(ir.And((truth_node(other), self.node)))

    def __or__(self, other: "Truth | bool") -> "Truth":
        return Truth(ir.Or((self.node, truth_node(other))))

    def __ror__(self, other: bool) -> "Truth":
        return Truth(ir.Or((truth_node(other), self.node)))

    def __invert__(self) -> "Truth":
        return Truth(ir.Not(self.node))

    __bool__ = Symbol.__bool__

    def __repr__(self) -> str:
        return show(self.node)


@dataclass(frozen=True)
class OperandArray:
    """A run-time array by name, indexed by traced integers; bare, a scalar.

    ``operand(name)[q]`` has an entry a query, ``[h, q // 64, k // 64]`` one for every
    head and block. Pass it as ``attention(..., operands={name: array})``: integers or
    bools, an axis an index, with an optional leading batch axis. Queries count from the
    first that is passed, whatever ``q_offset`` is, where an index reads nothing else.
    """

    name: str

    def __getitem__(self, index: "Symbol | tuple[Integer, ...]") -> Symbol:
        parts = index if isinstance(index, tuple) else (index,)
        if not parts or not any(isinstance(part, Symbol) for part in parts):
            raise TypeError(
                f"operand({self.name!r})[{index!r}]: the index must be made of q, k "
                "and h, one traced integer for each axis of the array"
            )
        nodes = tuple(as_node(part, "operand(...)[...]") for part in parts)
        return Symbol(ir.Operand(self.name, nodes))

    @property
    def node(self) -> ir.Expr:
        """The bare operand."""
        return ir.Operand(self.name, ())

    def _symbol(self) -> Symbol:
        return Symbol(self.node)

    def __add__(self, other: Integer) -> Symbol:
        return self._symbol() + other

    def __radd__(self, other: Integer) -> Symbol:
        return other + self._symbol()

    def __sub__(self, other: Integer) -> Symbol:
        return self._symbol() - other

    def __rsub__(self, other: Integer) -> Symbol:
        return other - self._symbol()

    def __mul__(self, other: int) -> Symbol:
        return self._symbol() * other

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Symbol:
        return self._symbol() // other

    def __mod__(self, other: int) -> Symbol:
        return self._symbol() % other

    def __le__(self, other: Integer) -> Truth:
        return self._symbol() <= other

    def __ge__(self, other: Integer) -> Truth:
        return self._symbol() >= other

    def __lt__(self, other: Integer) -> Truth:
        return self._symbol() < other

    def __gt__(self, other: Integer) -> Truth:
        return self._symbol() > other

    __bool__ = Symbol.__bool__


@dataclass(frozen=True)
class TableValues:
    """A constant table of integers; ``table(values)[q % 3]`` looks one up."""

    values: tuple[int, ...]

    def __getitem__(self, index: Integer) -> Symbol:
        return Symbol(ir.Table(self.values, as_node(index, "table index")))


def table(values: Iterable[Any]) -> Any:
    """A constant table to be indexed by positions; the index must stay inside it.

    A table of floats is for a bias.
    """
    found = tuple(values)
    if not found:
        raise ValueError("table(()): a table needs at least one value")
    if any(isinstance(v, float) for v in found):
        return TableNumbers(tuple(map(number, found)))
    return TableValues(tuple(operator.index(v) for v in found))


def operand(name: str) -> OperandArray:
    """A run-time array of a map: prefix lengths, document starts, masks of blocks."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"operand({name!r}): the name must be a Python identifier")
    return OperandArray(name)


def minimum(a: Integer, b: Integer) -> Symbol:
    """The smaller of two traced integers."""
    return Symbol(ir.Min(as_node(a, "minimum"), as_node(b, "minimum")))


def maximum(a: Integer, b: Integer) -> Symbol:
    """The larger of two traced integers."""
    return Symbol(ir.Max(as_node(a, "maximum"), as_node(b, "maximum")))


def floor_log2(x: Integer) -> Symbol:
    """The floor of the binary logarithm of a traced integer; 0 for one below 1."""
    return Symbol(ir.Log2(as_node(x, "floor_log2")))


def power_of_two(x: Integer) -> Truth:
    """Whether a traced integer is 1, 2, 4, 8, ..."""
    return Truth(ir.PowerOfTwo(as_node(x, "power_of_two")))


def isin(x: Integer, values: Iterable[int]) -> Truth:
    """Whether a traced integer is one of ``values``."""
    found = tuple(sorted({operator.index(v) for v in values}))
    return Truth(ir.In(as_node(x, "isin"), found))


def as_node(value: Any, op: str) -> ir.Expr:
    """The expression of a symbol, an operand or a Python integer."""
    if isinstance(value, Symbol | OperandArray):
        return value.node
    return ir.Const(constant(value, op))


def constant(value: Any, op: str) -> int:
    """A Python integer, or an error that says what ``op`` takes."""
    if isinstance(value, Symbol | OperandArray):
        raise TypeError(
            f"`{op}` takes a constant on one side, not two positions: multiplied, "
            "divided or reduced by a position, an index map cannot be analysed"
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{op}` in a traced map takes integers, not {value!r}")
    return operator.index(value)


def positive(value: int, op: str) -> int:
    """``value`` if it can be a divisor."""
    if value < 1:
        raise ValueError(
            f"`{op} {value}` in a traced map: the divisor must be positive"
        )
    return value


def truth_node(value: Any) -> ir.Pred:
    """The predicate of a truth or a Python bool."""
    if isinstance(value, Truth):
        return value.node
    if isinstance(value, bool):
        return ir.Bool(value)
    raise TypeError(
        f"expected a comparison of positions, not {value!r}: combine comparisons with "
        "`&`, `|` and `~`, each in parentheses"
    )
