"""What every traced value has: each operator is traced, or refused with a way out.

Python must never decide about a traced value by itself: an operator that is left
undefined compares identities, or lets NumPy and jax take the value apart.
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


# Refused unless a subclass traces it. In-place operators fall back on these. `array`
# is what `numpy_array[q]` and NumPy's functions ask for.
REFUSED = (
    "eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul",
    "matmul", "rmatmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "divmod", "rdivmod", "pow", "rpow", "lshift", "rlshift", "rshift", "rrshift", "and",
    "rand", "or", "ror", "xor", "rxor", "neg", "pos", "abs", "invert", "round", "trunc",
    "floor", "ceil", "int", "float", "complex", "index", "getitem", "iter", "contains",
    "len", "reversed", "array",
)  # fmt: skip


class NotTraced(TypeError):
    """An operation that has no expression; the message names the way out."""


class TracedValue:
    """A value that stands for an expression; subclasses define what is traced of it."""

    # What to do instead; a subclass may know better.
    way_out: ClassVar[str] = OPERATIONS

    # NumPy must not take the value apart: it defers to the operators below.
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


# Set from outside: to a type checker a subclass has only the operators it defines.
for _name in REFUSED:
    setattr(TracedValue, f"__{_name}__", TracedValue._refuse)


@contextmanager
def tracing(what: str) -> Iterator[None]:
    """While a caller's function runs on symbols: errors of others get a way out."""
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
      TypeError: it is none; ``op`` is what asked for it.
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
    """A value as an error shows it: an array by its shape."""
    shape = getattr(value, "shape", ())
    return f"an array of shape {tuple(shape)}" if shape else f"`{value!r}`"


def bound(
    function: Callable[..., Any], what: str, names: tuple[str, ...]
) -> tuple[str, ...]:
    """The first of ``names``, two or more, that ``function`` takes by position.

    A parameter is bound if the function needs it. All others are left alone: those with
    a default, as in ``lambda q, k, d=d: ...``, ``*args`` and ``**kwargs``.

    Raises:
      TypeError: it needs too few or too many, or needs one by keyword.
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
