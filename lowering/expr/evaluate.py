"""Evaluates a node elementwise: on NumPy arrays, on JAX arrays and inside a kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from types import ModuleType
from typing import Any, ClassVar, assert_never

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowering import ir
from lowering.expr.fits import MAX_SELECTS


@dataclass(frozen=True)
class _Positions:
    """Positions ``q`` and ``k`` that broadcast, the head, and the run-time arrays."""

    q: Any
    k: Any
    h: Any = 0
    operands: Mapping[str, Any] = field(default_factory=dict)

    def operand(self, name: str, index: tuple) -> Any:
        """The value of a run-time array."""
        if name not in self.operands:
            how = f"pass operands={{{name!r}: array}}"
            if not ir.is_name(name):
                how = "pass an entry of the batch of what sadsl.select(spec, q, k) says"
            raise ValueError(f"the map reads the run-time array {name!r}: {how}")
        return self.operands[name][index]


@dataclass(frozen=True)
class NumPy(_Positions):
    """Positions as NumPy arrays; operands without a batch axis."""

    xp: ClassVar[ModuleType] = np

    def hoisted(self, axis: str, slot: int) -> Any:
        """Never called: only kernels have hoisted vectors."""
        raise AssertionError(f"hoisted {axis} vector {slot} outside of a kernel")

    def hoisted_bits(self, slot: int) -> Any:
        """Never called: only kernels have hoisted bits."""
        raise AssertionError(f"hoisted bits {slot} outside of a kernel")

    def floor_div(self, x: Any, n: int) -> Any:
        """``x // n``, rounded down."""
        if n & (n - 1) == 0:  # several times faster
            return x >> (n.bit_length() - 1)
        return self.xp.floor_divide(x, n)

    def mod(self, x: Any, n: int) -> Any:
        """``x % n`` in ``0 .. n - 1``."""
        if n & (n - 1) == 0:
            return x & (n - 1)
        return self.xp.mod(x, n)

    def minimum(self, a: Any, b: Any) -> Any:
        """The smaller of two."""
        return self.xp.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger of two."""
        return self.xp.maximum(a, b)

    def log2(self, x: Any) -> Any:
        """The floor of the binary logarithm; 0 for values below 1."""
        return floor_log2(x)

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        """``values[index]``, clipped: the index of padding may be outside."""
        return np.take(array_of(values), index, mode="clip")

    def isin(self, x: Any, values: tuple[int, ...]) -> Any:
        """Whether ``x`` is one of ``values``."""
        return np.isin(x, array_of(values))

    def constant(self, value: bool) -> Any:
        """All pairs, or none."""
        return np.full((1, 1), value)


@dataclass(frozen=True)
class Jax(_Positions):
    """Positions and vectors as int32 arrays that broadcast; also inside kernels.

    Division uses ``lax`` primitives: while jnp traces ``//`` and ``%`` it queries the
    device, and a cross-compiler has none.
    """

    q_vectors: tuple = ()
    kv_vectors: tuple = ()
    bits: tuple = ()

    def hoisted(self, axis: str, slot: int) -> Any:
        """A vector that was computed outside of the kernel."""
        return self.q_vectors[slot] if axis == "q" else self.kv_vectors[slot]

    def hoisted_bits(self, slot: int) -> Any:
        """Bits that were computed outside of the kernel."""
        return self.bits[slot]

    def floor_div(self, x: Any, n: int) -> Any:
        """``x // n``, rounded down."""
        if n & (n - 1) == 0:
            return lax.shift_right_arithmetic(x, _like(x, n.bit_length() - 1))
        # div rounds to zero; the sign bit of a negative remainder subtracts one.
        quotient = lax.div(x, _like(x, n))
        sign = jnp.iinfo(jnp.result_type(x)).bits - 1
        return quotient + lax.shift_right_arithmetic(x - quotient * n, _like(x, sign))

    def mod(self, x: Any, n: int) -> Any:
        """``x % n`` in ``0 .. n - 1``."""
        if n & (n - 1) == 0:
            return lax.bitwise_and(x, _like(x, n - 1))
        r = lax.rem(x, _like(x, n))
        return jnp.where(r < 0, r + n, r)

    def minimum(self, a: Any, b: Any) -> Any:
        """The smaller of two."""
        return jnp.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger of two."""
        return jnp.maximum(a, b)

    def log2(self, x: Any) -> Any:
        """The floor of the binary logarithm, from a float's exponent; 0 below 1.

        ``x & ~(x >> 1)`` keeps the highest bit and clears the one below it, so that
        rounding to a float never carries into the next power of two.
        """
        x = jnp.maximum(x, 1)
        top = x & ~lax.shift_right_arithmetic(x, _like(x, 1))
        bits = lax.bitcast_convert_type(top.astype(jnp.float32), jnp.int32)
        return lax.shift_right_arithmetic(bits, _like(bits, 23)) - 127

    def table(self, values: tuple[int, ...], index: Any) -> Any:
        """``values[index]`` as a chain of selects, since kernels have no gather."""
        if jnp.ndim(index) and len(values) > MAX_SELECTS:
            raise NotImplementedError(
                f"a table of {len(values)} entries, indexed by both q and k, is more "
                f"than the {MAX_SELECTS} selects that a kernel makes of it: index it "
                "by q or by k alone, or use impl='reference'"
            )
        start = jnp.full_like(index, values[0])
        pairs = list(enumerate(values))[1:]
        return reduce(lambda a, iv: jnp.where(index == iv[0], iv[1], a), pairs, start)

    def isin(self, x: Any, values: tuple[int, ...]) -> Any:
        """Whether ``x`` is one of ``values``: one or two tests for each interval."""
        if not values:
            return x != x
        tests = [
            (x == lo) if lo == hi else (x >= lo) & (x <= hi)
            for lo, hi in intervals(values)
        ]
        return reduce(lambda a, b: a | b, tests)

    def constant(self, value: bool) -> Any:
        """A constant as a comparison, which every backend can broadcast."""
        return (self.q >= 0) if value else (self.q < 0)


def _like(x: Any, value: int) -> Any:
    return jnp.full(jnp.shape(x), value, jnp.result_type(x))


def floor_log2(x: Any) -> Any:
    """The floor of the binary logarithm of NumPy integers; 0 below 1."""
    x = np.maximum(x, 1)
    found = np.frexp(x)[1].astype(np.int64) - 1
    # From 2**53 on, a float may be rounded up to the next power of two.
    return found - (np.left_shift(np.int64(1), found) > x)


def intervals(values: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ascending numbers as maximal closed intervals ``(first, last)``."""
    found: list[tuple[int, int]] = []
    for value in values:
        if found and found[-1][1] == value - 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return found


def evaluate(node: ir.Node, at: NumPy | Jax) -> Any:
    """The value of ``node`` at positions: integers, or bools for a predicate."""
    seen: dict[ir.Expr, Any] = {}
    if isinstance(node, ir.Expr):
        return _integer(node, at, seen)
    return _truth(node, at, seen)


def _integer(node: ir.Expr, at: NumPy | Jax, seen: dict[ir.Expr, Any]) -> Any:
    """The value of an expression; parts that occur again are computed once."""
    if node not in seen:
        seen[node] = _compute(node, at, seen)
    return seen[node]


def _compute(node: ir.Expr, at: NumPy | Jax, seen: dict[ir.Expr, Any]) -> Any:
    def value(child: ir.Expr) -> Any:
        return _integer(child, at, seen)

    match node:
        case ir.Var(axis):
            return getattr(at, axis)
        case ir.Const(number):
            return number
        case ir.Add(a, b):
            return value(a) + value(b)
        case ir.Mul(a, n):
            return value(a) * n
        case ir.FloorDiv(a, n):
            return at.floor_div(value(a), n)
        case ir.Mod(a, n):
            return at.mod(value(a), n)
        case ir.Min(a, b):
            return at.minimum(value(a), value(b))
        case ir.Max(a, b):
            return at.maximum(value(a), value(b))
        case ir.Log2(a):
            return at.log2(value(a))
        case ir.Within(a, _):
            return value(a)
        case ir.Table(values, index):
            return at.table(values, value(index))
        case ir.Operand(name, index):
            return at.operand(name, tuple(value(i) for i in index))
        case ir.Hoisted(axis, slot):
            return at.hoisted(axis, slot)
    assert_never(node)


def _truth(node: ir.Pred, at: NumPy | Jax, seen: dict[ir.Expr, Any]) -> Any:
    match node:
        case ir.Bool(known):
            return at.constant(known)
        case ir.Le(a, b):
            return _array(_integer(a, at, seen) <= _integer(b, at, seen), at)
        case ir.Eq(a, b):
            return _array(_integer(a, at, seen) == _integer(b, at, seen), at)
        case ir.In(a, values):
            return at.isin(_integer(a, at, seen), values)
        case ir.PowerOfTwo(a):
            x = _integer(a, at, seen)
            return _array((x > 0) & ((x & (x - 1)) == 0), at)
        case ir.And(terms):
            return reduce(lambda a, b: a & b, [_truth(t, at, seen) for t in terms])
        case ir.Or(terms):
            return reduce(lambda a, b: a | b, [_truth(t, at, seen) for t in terms])
        case ir.Not(term):
            return ~_truth(term, at, seen)
        case ir.HoistedBits(slot):
            return at.hoisted_bits(slot)
        case ir.ByHead():
            raise AssertionError("heads are resolved before a predicate is evaluated")
    assert_never(node)


def _array(test: Any, at: NumPy | Jax) -> Any:
    """``test`` as an array: of a Python bool, ``~`` would make an int."""
    return at.constant(test) if isinstance(test, bool) else test


@lru_cache(maxsize=64)
def array_of(values: tuple[int, ...]) -> np.ndarray:
    """Entries as an int64 array, made once."""
    found = np.array(values, np.int64)
    found.flags.writeable = False
    return found
