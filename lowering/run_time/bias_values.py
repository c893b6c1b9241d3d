"""Evaluates the look-ups of a bias: the vectors and arrays that kernels add."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from lowering import ir
from lowering.bias import nodes
from lowering.expr.fits import INT32, ends
from lowering.expr.static_range import Known
from lowering.problem import Problem
from lowering.run_time.running_sums import running_sums
from lowering.run_time.vectors import AtPositions, evaluate_outside
from pallas_kernels.call import PairValues, ScoreValues

# The gradient of a look-up is a product with one-hot rows, which adds in a fixed order,
# AT_ONCE entries of these rows at a time. Beyond MOST entries it is XLA's scatter.
AT_ONCE = 1 << 22
MOST = 1 << 36


@dataclass(frozen=True)
class BiasPlaces:
    """The positions at which a bias is evaluated, ``[batch, head, ...]``.

    ``operands`` are the run-time arrays, ``[batch or 1, ...]``. ``q`` has queries of
    ``problem``, or differences ``q - k`` with ``k`` zero.
    """

    q: Any
    k: Any
    problem: Problem
    operands: Mapping[str, jax.Array]
    dtype: Any = jnp.float32

    @property
    def rank(self) -> int:
        """The number of axes of positions, and of the values."""
        return max(jnp.ndim(self.q), jnp.ndim(self.k))

    @property
    def known(self) -> Known:
        """The spans of positions and heads."""
        q_len, kv_len = self.problem.q_seq_len, self.problem.kv_seq_len
        heads = self.problem.num_heads
        return Known({"q": (-kv_len, q_len), "k": (0, kv_len), "h": (0, heads)}, INT32)

    def integer(self, expr: ir.Expr, dtype: Any) -> jax.Array:
        """The value of ``expr``; axes along which it does not vary have length one."""
        heads = self.problem.num_heads
        shape = (1, heads, *(1,) * (self.rank - 2))
        head = jnp.arange(heads, dtype=jnp.int32).reshape(shape)
        at = AtPositions(self.q, self.k, h=head, operands=self.operands)
        found = evaluate_outside(expr, at, self.known, dtype)
        return found.reshape((1,) * (self.rank - found.ndim) + found.shape)

    def index(self, expr: ir.Expr) -> jax.Array:
        """An index as int32, clipped: no array is longer than int32 can count."""
        low, high = ends(expr, self.known)
        if low < INT32[0] or high > INT32[1]:
            expr = ir.Min(ir.Max(expr, ir.Const(0)), ir.Const(INT32[1]))
        return self.integer(expr, jnp.int32)


def values(
    lowered: nodes.LoweredScore,
    problem: Problem,
    operands: Mapping[str, jax.Array],
    dtype: Any = jnp.float32,
) -> ScoreValues:
    """The arrays that ``lowered.kernel`` reads: ``[batch or 1, heads or 1, ...]``."""
    q_len, kv_len = problem.q_seq_len, problem.kv_seq_len
    queries = jnp.arange(q_len, dtype=jnp.int32)[None, None]
    keys = jnp.arange(kv_len, dtype=jnp.int32)[None, None]
    distances = jnp.arange(q_len + kv_len - 1, dtype=jnp.int32) - (kv_len - 1)
    zero = jnp.zeros((1, 1, 1), jnp.int32)
    at: dict[nodes.Layout, tuple[jax.Array, jax.Array]] = {
        "q": (queries, zero),
        "k": (zero, keys),
        # The pair with key 0 stands for all pairs of its diagonal.
        "diagonal": (distances[None, None], zero),
        "pairs": (queries[..., None], keys[:, :, None]),
    }

    def made(layout: nodes.Layout) -> list[jax.Array]:
        q, k = at[layout]
        places = BiasPlaces(q, k, problem, operands, dtype=dtype)
        lengths = np.broadcast_shapes(q.shape, k.shape)[2:]

        def of(terms: tuple[nodes.ScoreTerm, ...]) -> jax.Array:
            found = reduce(jnp.add, [_term(term, places) for term in terms])
            return jnp.broadcast_to(found, (*found.shape[:2], *lengths))

        return [of(terms) for terms in lowered.outside[nodes.LAYOUTS.index(layout)]]

    diagonals = (PairValues(x, diagonal=True) for x in made("diagonal"))
    pairs = (PairValues(x) for x in made("pairs"))
    return ScoreValues(tuple(made("q")), tuple(made("k")), (*diagonals, *pairs))


def dense(score: nodes.Score, places: BiasPlaces) -> jax.Array:
    """The bias at all places, without lowering: ``[batch or 1, heads or 1, ...]``."""
    match score:
        case nodes.Number(value):
            return jnp.full((1,) * places.rank, value, places.dtype)
        case nodes.Integer() | nodes.Log() | nodes.Numbers() | nodes.Weights():
            return _atom(score, places)
        case nodes.Sum(a, b):
            return dense(a, places) + dense(b, places)
        case nodes.ScoreProduct(a, b):
            return dense(a, places) * dense(b, places)
    assert_never(score)


def _term(term: nodes.ScoreTerm, places: BiasPlaces) -> jax.Array:
    factor = jnp.full((1,) * places.rank, term.factor, places.dtype)
    return reduce(jnp.multiply, [_atom(a, places) for a in term.atoms], factor)


def _atom(atom: nodes.Atom, places: BiasPlaces) -> jax.Array:
    match atom:
        case nodes.Integer(expr):
            return places.integer(expr, places.dtype)
        case nodes.Log(expr):
            found = places.integer(ir.Max(expr, ir.Const(1)), places.dtype)
            return jnp.log(found)
        case nodes.Numbers(table, index):
            numbers = jnp.asarray(table, places.dtype)[None]
            return look_up(numbers, [Index(places.index(index))])
        case nodes.Weights(name, index, running):
            found = places.operands[name].astype(places.dtype)
            if running is not None:
                whole, rest = running_sums(found)
                found = whole if running == "whole" else rest
            pairs = zip(index, found.shape[1:], strict=True)
            return look_up(found, [_index(i, size, places) for i, size in pairs])
    assert_never(atom)


class Index(NamedTuple):
    """Indices of one axis; ``whole``: they are 0, 1, 2, ..."""

    at: jax.Array
    whole: bool = False


def _index(expr: ir.Expr, size: int, places: BiasPlaces) -> Index:
    if expr == ir.H and size == 1:
        return Index(jnp.zeros((1,) * places.rank, jnp.int32))
    # On diagonals positions do not count from 0, but there no index is bare q or k.
    return Index(places.index(expr), whole=isinstance(expr, ir.Var))


def look_up(values: Float[Array, "..."], index: list[Index]) -> Float[Array, "..."]:
    """``values[b, index...]``, differentiable in both modes and to any order.

    ``values`` are ``[batch or 1, ...]``. The indices have the batch as their first axis
    and axes of length one where they do not vary; each is clipped to its axis.
    """
    limits = [size - 1 for size in values.shape[1:]]
    index = [
        i._replace(at=jnp.clip(i.at, 0, top))
        for i, top in zip(index, limits, strict=True)
    ]
    batch = max(i.at.shape[0] for i in index)
    if batch == 1:
        return _of_one(values, [i._replace(at=i.at[0]) for i in index])

    def of_entry(x: jax.Array, *at: jax.Array) -> jax.Array:
        pairs = zip(at, index, strict=True)
        return _of_one(x[None], [Index(a, i.whole) for a, i in pairs])[0]

    spread = [jnp.broadcast_to(i.at, (batch, *i.at.shape[1:])) for i in index]
    values = jnp.broadcast_to(values, (batch, *values.shape[1:]))
    return jax.vmap(of_entry)(values, *spread)


def _of_one(values: jax.Array, index: list[Index]) -> jax.Array:
    """``look_up`` for indices without a batch axis.

    Indices that vary along different axes are looked up one after the other, so that
    no index is broadcast to the shape of the result.
    """
    rank = index[0].at.ndim
    groups = _together(index)
    values = jnp.transpose(values, (0, *(1 + i for group in groups for i in group)))
    order: list[int] = []
    for group in groups:
        parts = [index[i] for i in group]
        sizes = values.shape[1 : 1 + len(group)]
        rest = values.shape[1 + len(group) :]
        shape = np.broadcast_shapes(*(i.at.shape for i in parts))
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        count = math.prod(shape)
        values = values.reshape(values.shape[0], math.prod(sizes), *rest)
        values = jnp.moveaxis(values, 1, -1)
        if len(parts) == 1 and parts[0].whole and count <= sizes[0]:
            values = jax.lax.slice_in_dim(values, 0, count, axis=-1)
        else:
            flat = jnp.zeros((1,) * rank, jnp.int32)
            for part, size in zip(parts, sizes, strict=True):
                flat = flat * size + part.at
            values = take(values, flat.reshape(-1))
        values = values.reshape(*values.shape[:-1], *(shape[i] for i in axes))
        order += axes
    found = jnp.transpose(values, (0, *(1 + i for i in np.argsort(order))))
    lengths = dict(zip(sorted(order), found.shape[1:], strict=True))
    return found.reshape(found.shape[0], *(lengths.get(i, 1) for i in range(rank)))


def _together(index: list[Index]) -> list[list[int]]:
    """Groups the indices: those that vary along a common axis are in one group."""
    groups: list[tuple[set[int], list[int]]] = []
    for i, part in enumerate(index):
        axes = {axis for axis, size in enumerate(part.at.shape) if size > 1}
        mine = [i]
        apart = []
        for other, members in groups:
            if other & axes:
                axes, mine = axes | other, members + mine
            else:
                apart.append((other, members))
        groups = [*apart, (axes, mine)]
    return [members for _, members in groups]


@jax.custom_jvp
def take(
    values: Float[Array, "*lead entries"], at: Int32[Array, " places"]
) -> Float[Array, "*lead places"]:
    """``values[..., at]``, with a gradient that adds in a fixed order."""
    return jnp.take(values, at, axis=-1, mode="clip")


@take.defjvp
def _take_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    values, at = primals
    return take(values, at), _picked(tangents[0], at)


def _picked(values: jax.Array, at: jax.Array) -> jax.Array:
    """``take`` as a matrix product with one-hot rows; its transpose is one too."""
    entries, (places,) = values.shape[-1], at.shape
    if entries * places > MOST:
        return jnp.take(values, at, axis=-1, mode="clip")
    every = jnp.arange(entries, dtype=jnp.int32)

    def product(at: jax.Array) -> jax.Array:
        rows = (at[:, None] == every[None]).astype(values.dtype)
        return jnp.einsum("...e,pe->...p", values, rows, precision="highest")

    size = max(1, AT_ONCE // entries)
    if places <= size:
        return product(at)
    at = jnp.pad(at, (0, -places % size)).reshape(-1, size)
    found = jnp.moveaxis(jax.lax.map(product, at), 0, -2)
    return found.reshape(*found.shape[:-2], -1)[..., :places]
