"""The base class of traced values: an operator is traced, or raises a helpful error.

No operator may be left undefined: Python would then compare identities, and NumPy and
jax would treat the value as an object or a sequence.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import numpy as np

OPERATIONS = (
    "traced are + - and * by constants, // and % by positive constants, comparisons, "
    "abs, `&` `|` `~` of comparisons, minimum, maximum, floor_log2, power_of_two and "
    "isin; use table(values)[q] for constants by position, and operand(name)[q] for "
    "an array that is passed as operands={name: array}"
)


# These raise NotTraced unless a subclass traces them. In-place operators fall back on
# them. `numpy_array[q]` and NumPy's functions call `__array__`.
REFUSED = (
    "eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul",
    "matmul", "rmatmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "divmod", "rdivmod", "pow", "rpow", "lshift", "rlshift", "rshift", "rrshift", "and",
    "rand", "or", "ror", "xor", "rxor", "neg", "pos", "abs", "invert", "round", "trunc",
    "floor", "ceil", "int", "float", "complex", "index", "getitem", "iter", "contains",
    "len", "reversed", "array",
)  # fmt: skip


class NotTraced(TypeError):
    """An operation cannot be traced; the message says what to write instead."""


class TracedValue:
    """A symbol with an expression; subclasses define the operators that are traced."""

    # A traced value stands for any pair: functions that are written for arrays of
    # queries ``[q, 1]`` and keys ``[1, k]`` see a pair of arrays with one entry.
    ndim: ClassVar[int] = 2
    size: ClassVar[int] = 1
    shape: ClassVar[tuple[int, int]] = (1, 1)

    # What to write instead of an operation that cannot be traced.
    way_out: ClassVar[str] = OPERATIONS

    # NumPy must use the operators below, and not broadcast over the value.
    __array_ufunc__ = None

    def _refuse(self, *_: object) -> NoReturn:
        raise NotTraced(f"cannot trace this operation on `{self!r}`: {self.way_out}")

    def __hash__(self) -> int:
        raise NotTraced(
            f"`{self!r}` cannot be looked up in a set or a dict while it is traced: "
            "write isin(q - k, {1, 2, 4}) or table(values)[q]"
        )

    def __bool__(self) -> bool:
        raise NotTraced(
            f"cannot branch on `{self!r}`: a map is traced once for all pairs; write "
            "`a & b`, `a | b`, `~a`, minimum(a, b) or maximum(a, b) instead of "
            "`and`, `or`, `not`, `if`, min, max or chained comparisons"
        )


# Set in a loop, so that a type checker sees only the operators a subclass defines.
for _name in REFUSED:
    setattr(TracedValue, f"__{_name}__", TracedValue._refuse)


@contextmanager
def tracing(what: str) -> Iterator[None]:
    """Runs a caller's function on symbols; adds a way out to the errors that it meets.

    Raises:
      NotTraced: instead of a ``TypeError`` or an ``IndexError``.
    """
    try:
        yield
    except NotTraced:
        raise
    except (TypeError, IndexError) as error:
        raise NotTraced(
            f"{what} cannot be traced: {error}. It runs once, on symbols, and "
            f"{OPERATIONS}"
        ) from error


def integer(value: Any, op: str) -> int:
    """A constant as a Python integer.

    Raises:
      TypeError: it is not an integer; ``op`` is the operation that needs it.
    """
    if not isinstance(value, bool | np.bool_ | TracedValue):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise NotTraced(
        f"`{op}` takes integers of positions, not {_shown(value)}: write int(x) for "
        "a constant, use table(values)[q] for constants by position, or operand(name)"
        "[q] for an array that is passed as operands={name: array}"
    )


def _shown(value: Any) -> str:
    """The text of a value in an error; of an array, its shape."""
    is_traced = isinstance(value, TracedValue)
    shape = () if is_traced else getattr(value, "shape", ())
    return f"an array of shape {tuple(shape)}" if shape else f"`{value!r}`"


def bound(
    function: Callable[..., Any], what: str, names: tuple[str, ...]
) -> tuple[str, ...]:
    """The arguments that ``function`` needs: two or more leading entries of ``names``.

    A parameter with a default keeps it, as in ``lambda q, k, d=d: ...``; ``*args`` and
    ``**kwargs`` stay empty.

    Raises:
      TypeError: the function needs fewer or more arguments, or one by keyword.
    """
    known = [f"({', '.join(names[:n])})" for n in range(2, len(names) + 1)]
    wanted = f"{what} takes a function of {', '.join(known[:-1])} or {known[-1]}"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{wanted}, whose parameters can be read, not {function!r}: write a lambda"
        ) from error
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = [p for p in parameters if p.default is p.empty and p.kind not in several]
    by_keyword = [p.name for p in needed if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if by_keyword or not 2 <= len(needed) <= len(names):
        found = ", ".join(p.name for p in needed)
        raise TypeError(
            f"{wanted}, not of {len(needed)} arguments that it needs, ({found})"
            + (f", {by_keyword[0]!r} of them by keyword" if by_keyword else "")
            + ": give every other parameter a default, as in `lambda q, k, d=d: ...`"
        )
    return names[: len(needed)]
