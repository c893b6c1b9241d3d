"""Traces functions that are written in ``jax.numpy``, by way of their jaxpr.

Symbols are no arrays of jax: ``jnp.where`` and ``jnp.logical_and`` refuse them. Such a
function is traced by jax instead, and the operations of its jaxpr are those of symbols.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from sadsl.maps.symbols import Symbol, Truth, maximum, minimum
from sadsl.maps.traced import NotTraced, tracing

# As functions of array-like positions expect them: queries and keys, head and length.
SHAPES = (1, 1), (1, 1), (), ()


def called(function: Callable[..., Any], symbols: Sequence[Symbol], what: str) -> Any:
    """What ``function`` of these symbols returns; if they are refused, by its jaxpr.

    Raises:
      NotTraced: it can be traced in neither way; ``what`` is its name.
    """
    try:
        with tracing(what):
            return function(*symbols)
    except NotTraced as error:
        # Only where another library refused a symbol: our own refusals stand.
        if error.__cause__ is None:
            raise
        try:
            return traced_by_jax(function, symbols)
        except (TypeError, ValueError):
            raise error from error.__cause__


def traced_by_jax(function: Callable[..., Any], symbols: Sequence[Symbol]) -> Any:
    """What ``function`` of these symbols returns, if it is written for arrays of jax.

    Raises:
      NotTraced: it has an operation that symbols have not.
      TypeError: jax cannot trace it either.
    """
    shapes = [jax.ShapeDtypeStruct(s, jnp.int32) for s in SHAPES[: len(symbols)]]
    jaxpr = jax.make_jaxpr(function)(*shapes)
    if len(jaxpr.out_avals) != 1:
        raise NotTraced(f"it returns {len(jaxpr.out_avals)} arrays: return one")
    return _run(jaxpr, symbols)[0]


def _run(jaxpr: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    inside = jaxpr.jaxpr
    known = dict(zip(inside.invars, values, strict=True))
    known |= zip(inside.constvars, map(_scalar, jaxpr.consts), strict=True)

    def value(x: Any) -> Any:
        return _scalar(x.val) if isinstance(x, Literal) else known[x]

    for eqn in inside.eqns:
        found = _equation(eqn, [value(x) for x in eqn.invars])
        known |= zip(eqn.outvars, found, strict=True)
    return [value(x) for x in inside.outvars]


def _equation(eqn: Any, values: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in ("jit", "pjit", "closed_call"):
        # Integer division of jax.numpy rounds towards 0 and corrects the result.
        whole = {"floor_divide": operator.floordiv, "remainder": operator.mod}
        of_jax = eqn.params.get("name")
        if of_jax in whole:
            return [whole[of_jax](*values)]
        return _run(eqn.params["jaxpr"], values)
    if name == "convert_element_type":
        kinds = {x.aval.dtype.kind for x in (*eqn.invars, *eqn.outvars)}
        if kinds in ({"b"}, {"i"}):
            return values
    if name in OPERATIONS:
        return [OPERATIONS[name](*values)]
    raise NotTraced(f"symbols have no operation {name!r} of jax")


def _scalar(x: Any) -> int | bool:
    """The value of a constant whose entries are all equal.

    Raises:
      NotTraced: they differ, or are floats.
    """
    array = np.asarray(x)
    if not array.size or (array != array.flat[0]).any() or array.dtype.kind not in "bi":
        raise NotTraced("a constant array is looked up by table(values)[index]")
    return array.flat[0].item()


def _same(x: Any) -> Any:
    return x


def _select(which: Any, when_false: Any, when_true: Any) -> Any:
    """``jnp.where`` of conditions."""
    if not all(isinstance(x, Truth | bool) for x in (which, when_false, when_true)):
        raise NotTraced("where chooses conditions, not integers")
    return (_inverted(which) & when_false) | (which & when_true)


def _inverted(x: Any) -> Any:
    return not x if isinstance(x, bool) else ~x


def _of_conditions(operation: Callable) -> Callable:
    def checked(a: Any, b: Any) -> Any:
        if not all(isinstance(x, Truth | bool) for x in (a, b)):
            raise NotTraced("`&` and `|` join conditions, not integers")
        return operation(a, b)

    return checked


def _extreme(of_symbols: Callable, of_numbers: Callable) -> Callable:
    def either(a: Any, b: Any) -> Any:
        traced = isinstance(a, Symbol) or isinstance(b, Symbol)
        return of_symbols(a, b) if traced else of_numbers(a, b)

    return either


OPERATIONS: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": abs,
    "max": _extreme(maximum, max),
    "min": _extreme(minimum, min),
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": _of_conditions(operator.and_),
    "or": _of_conditions(operator.or_),
    "xor": _of_conditions(operator.xor),
    "not": _inverted,
    "select_n": _select,
    "broadcast_in_dim": _same,
    "reshape": _same,
    "squeeze": _same,
    "copy": _same,
}
