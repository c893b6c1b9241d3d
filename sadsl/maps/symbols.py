"""Integers and conditions as symbols, on which ``where`` and ``bias`` are traced."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, TypeAlias

import jax
import numpy as np

from lowering import ir
from lowering.bias import nodes as scores
from lowering.expr.printing import show
from sadsl.maps.numbers import Real, TableNumbers, number
from sadsl.maps.operand_names import check_operand_name
from sadsl.maps.traced import NotTraced, TracedValue, integer

Integer: TypeAlias = "Symbol | int"


def _or_real(method: Callable) -> Callable:
    """Wraps a method of ``Symbol``: with a float, it is that of ``Real`` instead."""

    @wraps(method)
    def either(self: "Symbol", other: Any) -> Any:
        if isinstance(other, float | np.floating | Real):
            return getattr(Real(scores.Integer(self.node)), method.__name__)(other)
        return method(self, other)

    return either


@dataclass(frozen=True, eq=False, repr=False)
class Symbol(TracedValue):
    """A traced integer: a position, a head, or an expression of them.

    These operations are traced: ``+``, ``-``, ``*`` by a constant, ``//`` and ``%`` by
    a positive constant, comparisons, ``abs``, ``minimum``, ``maximum``,
    ``floor_log2``, ``power_of_two``, ``isin`` and ``table``. A comparison yields a
    ``Truth``.
    """

    node: ir.Expr

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

    def __pos__(self) -> "Symbol":
        return self

    def __abs__(self) -> "Symbol":
        return maximum(self, -self)

    @_or_real
    def __mul__(self, other: int) -> "Symbol":
        return Symbol(ir.Mul(self.node, constant(other, "*")))

    @_or_real
    def __rmul__(self, other: int) -> "Symbol":
        return self * other

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
        return Truth(ir.Not(ir.Le(right, self.node)))

    def __gt__(self, other: Integer) -> "Truth":
        left = as_node(other, ">")
        if isinstance(left, ir.Const):
            return Truth(ir.Le(ir.Const(left.value + 1), self.node))
        return Truth(ir.Not(ir.Le(self.node, left)))

    def __eq__(self, other: object) -> "Truth":  # type: ignore[override]
        return Truth(ir.Eq(self.node, as_node(other, "==")))

    def __ne__(self, other: object) -> "Truth":  # type: ignore[override]
        return ~(self == other)

    def isin(self, values: Iterable[int]) -> "Truth":
        """Whether this integer is one of ``values``."""
        return isin(self, values)

    __hash__ = TracedValue.__hash__

    def __repr__(self) -> str:
        return show(self.node)


# The arguments of a traced function, in order: query, key, head, number of keys.
POSITIONS = {"q": Symbol(ir.Q), "k": Symbol(ir.K), "h": Symbol(ir.H), "n": Symbol(ir.N)}


@dataclass(frozen=True, eq=False, repr=False)
class Truth(TracedValue):
    """A traced condition, combined by ``&``, ``|``, ``^``, ``~``, ``==`` and ``!=``."""

    node: ir.Pred

    way_out: ClassVar[str] = (
        "comparisons are combined by `&`, `|`, `^`, `~`, `==` and `!=`, each in "
        "parentheses; write `table((0, 1))[x]` or a comparison where an integer is "
        "wanted"
    )

    def __and__(self, other: "Truth | bool") -> "Truth":
        return Truth(ir.And((self.node, truth_node(other))))

    def __rand__(self, other: bool) -> "Truth":
        return Truth(ir.And((truth_node(other), self.node)))

    def __or__(self, other: "Truth | bool") -> "Truth":
        return Truth(ir.Or((self.node, truth_node(other))))

    def __ror__(self, other: bool) -> "Truth":
        return Truth(ir.Or((truth_node(other), self.node)))

    def __xor__(self, other: "Truth | bool") -> "Truth":
        right = Truth(truth_node(other))
        return (self & ~right) | (~self & right)

    __rxor__ = __xor__

    def __eq__(self, other: object) -> "Truth":  # type: ignore[override]
        return ~(self ^ other)  # type: ignore[operator]

    def __ne__(self, other: object) -> "Truth":  # type: ignore[override]
        return self ^ other  # type: ignore[operator]

    __hash__ = TracedValue.__hash__

    def __invert__(self) -> "Truth":
        if isinstance(self.node, ir.Bool):
            # Not `~True`: Python would read that text as -2.
            return Truth(ir.Bool(not self.node.value))
        return Truth(ir.Not(self.node))

    def __repr__(self) -> str:
        return show(self.node)


class OperandArray(Symbol):
    """A named run-time array, indexed by traced integers; made by ``operand``."""

    def __init__(self, name: str) -> None:
        super().__init__(ir.Operand(name, ()))

    @property
    def name(self) -> str:
        """The name under which the array is passed."""
        assert isinstance(self.node, ir.Operand)
        return self.node.name

    def __getitem__(self, index: "Symbol | tuple[Integer, ...]") -> Symbol:
        parts = index if isinstance(index, tuple) else (index,)
        nodes = tuple(as_node(part, "operand(...)[...]") for part in parts)
        if not any(ir.axes(node) for node in nodes):
            raise NotTraced(
                f"operand({self.name!r})[{index!r}]: the index must be made of q, k "
                "and h, one traced integer for each axis of the array; for a scalar, "
                f"write operand({self.name!r}) without an index"
            )
        return Symbol(ir.Operand(self.name, nodes))


@dataclass(frozen=True, eq=False)
class TableValues(TracedValue):
    """A constant table of integers, indexed as ``table(values)[q % 3]``."""

    values: tuple[int, ...]

    way_out: ClassVar[str] = "look up a value of the table, as in table(values)[q % 3]"

    def __getitem__(self, index: Integer) -> Symbol:
        return Symbol(ir.Table(self.values, as_node(index, "table index")))


def table(values: Iterable[Any]) -> Any:
    """A constant table that a traced integer indexes.

    Args:
      values: integers, for maps and biases; or floats, for biases only. The index must
        stay inside of the table for every position of a call.

    Raises:
      ValueError: there is no value.
      TypeError: a value is not a number.

    Example:
      >>> import sadsl as sa
      >>> first = sa.table((0, 2))  # the first key of even queries, of odd ones
      >>> print(sa.where(lambda q, k: k >= first[q % 2]).picture(2, 4))
      ####
      ..##
    """
    found = tuple(values)
    if not found:
        raise ValueError("table(()): a table needs at least one value: give some")
    if any(isinstance(v, float) for v in found):
        return TableNumbers(tuple(map(number, found)))
    return TableValues(ir.TableEntries(integer(v, "table") for v in found))


def operand(name: str) -> OperandArray:
    """A run-time array that a map reads: prefix lengths, document starts, block masks.

    ``operand(name)[q]`` reads an entry for each query, ``operand(name)[h, q // 64,
    k // 64]`` one for each head and block; without an index it is a scalar. Pass the
    array as ``attention(..., operands={name: array})``: integers or bools, one axis for
    each index, and perhaps a batch axis in front. New values do not recompile. An axis
    indexed by ``q`` alone counts queries from the first one passed, whatever
    ``q_offset`` is.

    Args:
      name: the name of the operand, a Python identifier.

    Raises:
      ValueError: the name is not a Python identifier.

    Example:
      >>> import sadsl as sa
      >>> import numpy as np
      >>> prefix = sa.where(lambda q, k: k < sa.operand("length"))
      >>> spec = sa.causal() | prefix
      >>> print(spec.dense(3, operands={"length": np.array(2)})[0].astype(int))
      [[1 1 0]
       [1 1 0]
       [1 1 1]]
    """
    check_operand_name("operand: name", name)
    return OperandArray(name)


def minimum(a: Integer, b: Integer) -> Symbol:
    """The smaller of two integers, at least one of them traced.

    Example:
      >>> import sadsl as sa
      >>> sa.where(lambda q, k: sa.minimum(q, 4) == k)
      where(lambda q, k: minimum(q, 4) == k)
    """
    return Symbol(ir.Min(as_node(a, "minimum"), as_node(b, "minimum")))


def maximum(a: Integer, b: Integer) -> Symbol:
    """The larger of two integers, at least one of them traced.

    Example:
      >>> import sadsl as sa
      >>> sa.where(lambda q, k: sa.maximum(q - 4, 0) <= k)
      where(lambda q, k: maximum(q - 4, 0) <= k)
    """
    return Symbol(ir.Max(as_node(a, "maximum"), as_node(b, "maximum")))


def floor_log2(x: Integer) -> Symbol:
    """The binary logarithm of a traced integer, rounded down; 0 for values below 1.

    Example:
      >>> import sadsl as sa
      >>> print(sa.where(lambda q, k: k <= sa.floor_log2(q)).picture(5))
      #....
      #....
      ##...
      ##...
      ###..
    """
    return Symbol(ir.Log2(as_node(x, "floor_log2")))


def power_of_two(x: Integer) -> Truth:
    """Whether a traced integer is 1, 2, 4, 8, ...

    Example:
      >>> import sadsl as sa
      >>> print(sa.where(lambda q, k: sa.power_of_two(k)).picture(1, 9))
      .##.#...#
    """
    return Truth(ir.PowerOfTwo(as_node(x, "power_of_two")))


def isin(x: Integer, values: Iterable[int]) -> Truth:
    """Whether a traced integer is one of some constants.

    Example:
      >>> import sadsl as sa
      >>> print(sa.where(lambda q, k: sa.isin(k, {0, 3})).picture(1, 4))
      #..#
    """
    found = tuple(sorted({integer(v, "isin") for v in values}))
    return Truth(ir.In(as_node(x, "isin"), found))


def as_node(value: Any, op: str) -> ir.Expr:
    """The expression of a symbol or a Python integer."""
    return value.node if isinstance(value, Symbol) else ir.Const(integer(value, op))


def constant(value: Any, op: str) -> int:
    """A constant as a Python integer.

    Raises:
      TypeError: it is traced, or not an integer; ``op`` is the operation that needs it.
    """
    if isinstance(value, Symbol):
        raise NotTraced(
            f"`{op}` takes a constant on one side, not two positions: a product, "
            "quotient or remainder of two positions cannot be analysed; use "
            "table(values)[x] for a function of one integer"
        )
    return integer(value, op)


def positive(value: int, op: str) -> int:
    """Returns ``value``; raises a ``ValueError`` if it is below 1."""
    if value < 1:
        raise ValueError(
            f"`{op} {value}` in a traced map: the divisor must be positive: give an "
            "integer of at least 1"
        )
    return value


def truth_node(value: Any) -> ir.Pred:
    """The expression of a ``Truth`` or a bool."""
    if isinstance(value, Truth):
        return value.node
    if isinstance(value, bool | np.bool_):
        return ir.Bool(bool(value))
    # As functions of array-like positions write `np.ones((q.shape[0], k.shape[1]))`,
    # or that of jnp.
    is_array = isinstance(value, np.ndarray | jax.Array)
    if is_array and value.dtype == bool and value.shape == (1, 1):
        return ir.Bool(bool(np.asarray(value)[0, 0]))
    raise NotTraced(
        f"expected a comparison of positions, not {value!r}: combine comparisons with "
        "`&`, `|` and `~`, each in parentheses, and write bool(x) for a constant"
    )
