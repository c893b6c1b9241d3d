"""Evaluates a predicate on words of 32 rows instead of single pairs, where it can.

The predicate is traced to a jaxpr, whose booleans are then computed as words: a
comparison of the row's position with a value of the column holds for the rows from some
row on, so its words follow from that row; ``and``, ``or`` and ``not`` are done on
words. All other comparisons are evaluated on the tile, as they are without bits.
``causal() & topk(...)`` thus costs a tile no more than the bits alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from pallas_kernels.tpu.bit_tiles import from_row, unpacked
from pallas_kernels.tpu.bit_words import RowBits


class Position(NamedTuple):
    """``sign * r + offset`` in row ``r`` of the tile: an int32 of rows.

    ``sign`` is 1 or -1, and ``offset`` is a scalar or ``[1, columns]``.
    """

    sign: int
    offset: Any


class Packed(NamedTuple):
    """A bool tile: the pairs in ``words`` that are also in ``tile``, if not None."""

    words: jax.Array
    tile: Any = None


def evaluate(predicate: Callable[..., Any], args: Any, rows: RowBits) -> jax.Array:
    """The bool tile of ``predicate(*args)``.

    ``args`` is a tree of arrays; instead of an array, it may have a ``Position`` (of
    int32 ``[rows, 1]``) or a ``Packed`` (of a bool tile).
    """
    leaves, tree = jax.tree.flatten(args, is_leaf=_is_special)
    shapes = [_shape_of(x, rows) for x in leaves]
    jaxpr = jax.make_jaxpr(lambda *flat: predicate(*tree.unflatten(flat)))(*shapes)
    known: dict[Any, Any] = dict(zip(jaxpr.jaxpr.invars, leaves, strict=True))
    known |= zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)

    def value(x: Any) -> Any:
        return np.asarray(x.val) if isinstance(x, Literal) else known[x]

    for equation in jaxpr.jaxpr.eqns:
        inputs = [value(x) for x in equation.invars]
        found = None
        if any(map(_is_special, inputs)):
            rule = RULES.get(equation.primitive.name)
            found = rule and rule(*inputs, rows=rows)
        if found is not None:
            known[equation.outvars[0]] = found
            continue
        variables = [x for x in equation.invars if not isinstance(x, Literal)]
        one = jaxpr.jaxpr.replace(
            constvars=[],
            invars=variables,
            outvars=equation.outvars,
            eqns=[equation],
        )
        plain = [_plain(known[x], rows) for x in variables]
        results = jax.core.eval_jaxpr(one, (), *plain)
        known |= zip(equation.outvars, results, strict=True)
    (result,) = jaxpr.jaxpr.outvars
    return _plain(value(result), rows)


def _is_special(x: Any) -> bool:
    return isinstance(x, Position | Packed)


def _shape_of(x: Any, rows: RowBits) -> jax.ShapeDtypeStruct:
    if isinstance(x, Position):
        return jax.ShapeDtypeStruct((rows.rows, 1), jnp.int32)
    if isinstance(x, Packed):
        return jax.ShapeDtypeStruct((rows.rows, x.words.shape[1]), jnp.bool_)
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _plain(x: Any, rows: RowBits) -> Any:
    """``x`` as an array."""
    if isinstance(x, Position):
        return x.sign * lax.broadcasted_iota(jnp.int32, (rows.rows, 1), 0) + x.offset
    if isinstance(x, Packed):
        tile = unpacked(x.words, rows)
        return tile if x.tile is None else tile & x.tile
    return x


def _of_columns(x: Any) -> bool:
    """Whether ``x`` is an array that is the same in all rows."""
    return not _is_special(x) and (jnp.ndim(x) < 2 or jnp.shape(x)[0] == 1)


def _negative(x: Any, *, rows: RowBits) -> Any:
    return Position(-x.sign, -x.offset) if isinstance(x, Position) else None


def _sum(a: Any, b: Any, *, rows: RowBits) -> Any:
    if isinstance(b, Position):
        a, b = b, a
    if isinstance(a, Position) and _of_columns(b):
        return Position(a.sign, a.offset + b)
    return None


def _difference(a: Any, b: Any, *, rows: RowBits) -> Any:
    if isinstance(b, Position):
        return _sum(a, _negative(b, rows=rows), rows=rows)
    return _sum(a, -b, rows=rows) if _of_columns(b) else None


def _product(a: Any, b: Any, *, rows: RowBits) -> Any:
    if isinstance(b, Position):
        a, b = b, a
    if not isinstance(a, Position) or _is_special(b):
        return None
    # Literals of the jaxpr are NumPy scalars.
    factor = int(b) if isinstance(b, np.ndarray) and not b.ndim else None
    if factor == 1:
        return a
    return _negative(a, rows=rows) if factor == -1 else None


def _at_most(a: Any, b: Any, *, rows: RowBits) -> Any:
    if isinstance(a, Position) and _of_columns(b):
        return _from(a.sign, a.offset, b, rows, below=True)
    if isinstance(b, Position) and _of_columns(a):
        return _from(b.sign, b.offset, a, rows, below=False)
    return None


def _from(sign: int, offset: Any, bound: Any, rows: RowBits, *, below: bool) -> Packed:
    """The rows whose position is at most ``bound``, or at least (not ``below``)."""
    # The bound is brought near the positions first, so that no difference overflows.
    size = rows.rows
    lowest = offset if sign > 0 else offset - (size - 1)
    bound = jnp.clip(bound, lowest - 1, lowest + size)
    # From row ``first`` on, the comparison holds; or it holds before that row.
    ends = below == (sign > 0)
    first = bound - offset if sign > 0 else offset - bound
    first = jnp.clip(first + int(ends), 0, size)
    words = from_row(first.reshape(1, -1), rows)
    return Packed(~words if ends else words)


def _not(x: Any, *, rows: RowBits) -> Any:
    return Packed(~x.words) if _is_words(x) else None


def _and(a: Any, b: Any, *, rows: RowBits) -> Any:
    if not isinstance(a, Packed):
        a, b = b, a
    if not isinstance(a, Packed) or isinstance(b, Position):
        return None
    if isinstance(b, Packed):
        tiles = [x.tile for x in (a, b) if x.tile is not None]
        both = tiles[0] & tiles[1] if len(tiles) == 2 else None
        return Packed(a.words & b.words, tiles[0] if len(tiles) == 1 else both)
    if _of_columns(b):
        return Packed(a.words & _in_all_rows(b), a.tile)
    return Packed(a.words, b if a.tile is None else a.tile & b)


def _or(a: Any, b: Any, *, rows: RowBits) -> Any:
    if not _is_words(a):
        a, b = b, a
    if not _is_words(a):
        return None
    if _is_words(b):
        return Packed(a.words | b.words)
    return Packed(a.words | _in_all_rows(b)) if _of_columns(b) else None


def _is_words(x: Any) -> bool:
    return isinstance(x, Packed) and x.tile is None


def _in_all_rows(x: Any) -> jax.Array:
    """The words of a bool that is the same in all rows."""
    return jnp.where(x, jnp.int32(-1), jnp.int32(0))


def _complement(rule: Callable[..., Any]) -> Callable[..., Any]:
    def of(a: Any, b: Any, *, rows: RowBits) -> Any:
        found = rule(a, b, rows=rows)
        return None if found is None else _not(found, rows=rows)

    return of


def _at_least(a: Any, b: Any, *, rows: RowBits) -> Any:
    return _at_most(b, a, rows=rows)


# What each primitive of a jaxpr does to positions and packed tiles. None means that
# the result is computed on the tile.
RULES: dict[str, Callable[..., Any]] = {
    "neg": _negative,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "le": _at_most,
    "ge": _at_least,
    "lt": _complement(_at_least),
    "gt": _complement(_at_most),
    "not": _not,
    "and": _and,
    "or": _or,
}
