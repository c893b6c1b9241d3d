"""Nodes of a bias, and the split into what kernels compute and what is made outside.

A bias is added to the scores. It is a sum of products of integers of positions,
constants and look-ups. An expression of positions alone is computed in the kernel, on
every tile. A look-up is computed outside, in ordinary JAX, in the smallest layout that
holds it: a vector over the queries or the keys, a vector over the diagonals if it
depends on ``q - k`` alone, or an array of all pairs. Kernels multiply and add these.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeGuard, assert_never

import jax.numpy as jnp

from lowering import ir
from lowering.expr.evaluate import Jax, evaluate
from lowering.expr.fits import is_plain, known_of
from lowering.expr.places import NO_ARRAYS, WholeArrays, shift_queries
from lowering.expr.printing import show
from lowering.expr.simplify import integer
from lowering.expr.static_range import Known
from lowering.problem import Problem

Layout = Literal["q", "k", "diagonal", "pairs"]
Running = Literal["whole", "rest"]
NO_NAMES: Mapping[str, str] = MappingProxyType({})
LAYOUTS: tuple[Layout, ...] = ("q", "k", "diagonal", "pairs")


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer expression of positions, converted to a number."""

    expr: ir.Expr


@dataclass(frozen=True, slots=True)
class Log:
    """The natural logarithm of an integer expression; 0 where that is below 1."""

    expr: ir.Expr


@dataclass(frozen=True, slots=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True, slots=True)
class Numbers:
    """``values[index]``: a constant table; the index lies within it."""

    values: tuple[float, ...]
    index: ir.Expr


@dataclass(frozen=True, slots=True)
class Weights:
    """A run-time array of floats at ``index``, with one expression for each axis.

    An axis that is indexed by ``q`` itself counts the queries of the call: ``q_offset``
    does not shift it. An axis of length one that is indexed by the head is shared by
    all heads.

    ``running``: the look-up is in the running sum along the first axis, which counts
    positions. That sum is a whole number and a rest, looked up by two nodes, so that
    differences of sums keep their digits (``run_time/running_sums.py``).
    """

    name: str
    index: tuple[ir.Expr, ...]
    running: Running | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """``left + right``."""

    left: "Score"
    right: "Score"


@dataclass(frozen=True, slots=True)
class ScoreProduct:
    """``left * right``."""

    left: "Score"
    right: "Score"


Atom: TypeAlias = Integer | Log | Numbers | Weights
ATOMS = (Integer, Log, Numbers, Weights)
Score: TypeAlias = Atom | Number | Sum | ScoreProduct


@dataclass(frozen=True)
class ScoreTerm:
    """``factor`` times the product of ``atoms``."""

    factor: float
    atoms: tuple[Atom, ...] = ()


@dataclass(frozen=True)
class KernelTerm:
    """``factor`` times the integers ``exprs``, times arrays made outside.

    ``held`` has ``(layout, slot)``: the array number ``slot`` of that layout.
    """

    factor: float
    exprs: tuple[ir.Expr, ...] = ()
    held: tuple[tuple[Layout, int], ...] = ()


@dataclass(frozen=True)
class KernelScore:
    """The bias that a kernel adds to a tile of scores; hashable, equal by content."""

    terms: tuple[KernelTerm, ...]
    num_diagonals: int = 0
    dtype: Any = jnp.float32

    def __call__(
        self, q_ids: Any, k_ids: Any, q_vectors: tuple, kv_vectors: tuple, pairs: tuple
    ) -> Any:
        """The bias in natural units, broadcasting over the ids: see ``call.Scores``."""
        at = Jax(q_ids, k_ids)
        arrays: dict[Layout, tuple] = {
            "q": q_vectors,
            "k": kv_vectors,
            "diagonal": pairs[: self.num_diagonals],
            "pairs": pairs[self.num_diagonals :],
        }

        def value(term: KernelTerm) -> Any:
            parts = [
                jnp.asarray(evaluate(expr, at)).astype(self.dtype)
                for expr in term.exprs
            ]
            # Vectors come before tiles: they are cheaper to multiply.
            parts += [arrays[layout][slot] for layout, slot in term.held]
            found = parts[0] if term.factor == 1 else parts[0] * term.factor
            for part in parts[1:]:
                found = found * part
            return found

        found = value(self.terms[0])
        for term in self.terms[1:]:
            found = found + value(term)
        return found


@dataclass(frozen=True)
class LoweredScore:
    """A lowered bias: what kernels compute, and the arrays that are made outside.

    ``outside`` has a tuple for each of ``LAYOUTS``; each entry stands for an array of
    that layout, as a sum of terms. ``learned``: whether some part reads weights.
    """

    kernel: KernelScore
    outside: tuple[tuple[tuple[ScoreTerm, ...], ...], ...]
    learned: bool


@lru_cache(maxsize=256)
def lower(score: Score, problem: Problem) -> LoweredScore:
    """Splits a bias into what is computed in the kernel and what is made outside."""
    arrays: dict[Layout, list[list[ScoreTerm]]] = {layout: [] for layout in LAYOUTS}
    shared: dict[tuple[Any, ...], int] = {}
    whole: list[KernelTerm] = []
    products: list[KernelTerm] = []
    lengths = problem.q_seq_len, problem.kv_seq_len
    known = known_of(*lengths, problem.num_heads)
    for term in terms_of(resolved(score, problem)):
        exprs, outside = _split(term, known)
        if not outside:
            products.append(KernelTerm(term.factor, exprs))
            continue
        (layout, atoms), *others = outside.items()
        is_whole = any(isinstance(a, Weights) and a.running == "whole" for a in atoms)
        # Terms that differ in one array alone share it: the sum of both. Whole parts of
        # running sums are added to nothing else before their difference is taken.
        key = exprs, layout, tuple(others), is_whole
        if key not in shared:
            held = tuple((each, len(arrays[each])) for each in outside)
            shared[key] = len(arrays[layout])
            arrays[layout].append([])
            for each, found in others:
                arrays[each].append([ScoreTerm(1.0, found)])
            (whole if is_whole else products).append(KernelTerm(1.0, exprs, held))
        arrays[layout][shared[key]].append(ScoreTerm(term.factor, atoms))
    kernel = KernelScore((*whole, *products), len(arrays["diagonal"]))
    made = tuple(tuple(map(tuple, arrays[layout])) for layout in LAYOUTS)
    return LoweredScore(kernel, made, any(isinstance(n, Weights) for n in walk(score)))


def resolved(score: Score, problem: Problem) -> Score:
    """The bias in array indices instead of positions, with ``n`` resolved."""
    offset = problem.q_offset

    def at_positions(expr: ir.Expr) -> ir.Expr:
        new: dict[ir.Axis, ir.Expr] = {"n": ir.Const(problem.kv_seq_len)}
        expr = ir.substitute(expr, new)
        return integer(shift_queries(expr, offset) if offset else expr)

    return with_indices(score, at_positions)


def with_indices(
    score: Score,
    change: Callable[[ir.Expr], ir.Expr],
    whole: WholeArrays = NO_ARRAYS,
    queries: Mapping[str, str] = NO_NAMES,
) -> Score:
    """The bias with ``change`` applied to the integers of positions.

    An axis of an array that is indexed by ``q`` or ``k`` itself stays, unless the array
    is ``whole``: it has the queries or the keys that are passed, whatever their
    positions. A running sum is over positions. What is read at the query itself has
    another name in ``queries``.
    """

    def changed(node: Score) -> Score:
        match node:
            case Integer(expr) | Log(expr):
                return type(node)(change(expr))
            case Number():
                return node
            case Numbers(values, index):
                return Numbers(values, change(index))
            case Weights(name, index, running):
                own = running is None
                kept = [
                    own and i in (ir.Q, ir.K) and whole.owns(name, i) for i in index
                ]
                name = queries.get(name, name) if ir.Q in index else name
                at = (
                    i if stays else change(i)
                    for i, stays in zip(index, kept, strict=True)
                )
                return Weights(name, tuple(at), running)
            case Sum(a, b) | ScoreProduct(a, b):
                return type(node)(changed(a), changed(b))
        assert_never(node)

    return changed(score)


def terms_of(score: Score) -> list[ScoreTerm]:
    """The bias as a sum of products; the constants of a product are multiplied."""
    match score:
        case Number(value):
            return [ScoreTerm(value)]
        case Integer(ir.Const(value)):
            return [ScoreTerm(float(value))]
        case Integer() | Log() | Numbers() | Weights():
            return [ScoreTerm(1.0, (score,))]
        case Sum(a, b):
            return [*terms_of(a), *terms_of(b)]
        case ScoreProduct(a, b):
            return [
                ScoreTerm(x.factor * y.factor, (*x.atoms, *y.atoms))
                for x in terms_of(a)
                for y in terms_of(b)
            ]
    assert_never(score)


def _split(
    term: ScoreTerm, known: Known
) -> tuple[tuple[ir.Expr, ...], dict[Layout, tuple[Atom, ...]]]:
    """The integers of a term that a kernel computes, and its other atoms by layout."""
    exprs = tuple(a.expr for a in term.atoms if _in_kernel(a, known))
    rest = [a for a in term.atoms if not _in_kernel(a, known)]
    both = tuple(a for a in rest if {"q", "k"} <= axes(a))
    shared: Layout = "diagonal" if all(map(is_diagonal, both)) else "pairs"
    parts: tuple[tuple[Layout, tuple[Atom, ...]], ...] = (
        ("q", tuple(a for a in rest if axes(a) - {"h"} == {"q"})),
        ("k", tuple(a for a in rest if axes(a) - {"h"} == {"k"})),
        (shared, both),
    )
    found = {layout: atoms for layout, atoms in parts if atoms}
    alone = tuple(a for a in rest if axes(a) <= {"h"})
    if alone or not (exprs or found):
        # Atoms that depend on the head alone join another array, if there is one. A
        # constant becomes a vector.
        host: Layout = next(iter(found), "q")
        found[host] = (*found.get(host, ()), *alone)
    return exprs, found


def _in_kernel(atom: Atom, known: Known) -> TypeGuard[Integer]:
    """Whether a kernel computes the atom: 32-bit arithmetic of positions, no head."""
    if not isinstance(atom, Integer) or "h" in ir.axes(atom.expr):
        return False
    return is_plain(atom.expr, known)


def indices(atom: Atom) -> tuple[ir.Expr, ...]:
    """The integer expressions in an atom."""
    match atom:
        case Integer(expr) | Log(expr):
            return (expr,)
        case Numbers(_, index):
            return (index,)
        case Weights(_, index, _):
            return index
    assert_never(atom)


def axes(atom: Atom) -> frozenset[ir.Axis]:
    """The variables that the atom depends on."""
    return frozenset().union(*(ir.axes(i) for i in indices(atom)))


def is_diagonal(atom: Atom) -> bool:
    """Whether the atom depends on ``q - k`` alone, and perhaps on the head."""
    # q = distance + k; a hoisted value has no known range, and so no known sign.
    distance = ir.Hoisted("q", 0)
    new: dict[ir.Axis, ir.Expr] = {"q": ir.Add(distance, ir.K)}
    found = [integer(ir.substitute(i, new)) for i in indices(atom)]
    return not any("k" in ir.axes(i) or _reads(i) for i in found)


def _reads(expr: ir.Expr) -> bool:
    return any(isinstance(n, ir.Operand) for n in ir.walk(expr))


def walk(score: Score) -> Iterator[Score]:
    """The score and all its descendants, parents first."""
    yield score
    if isinstance(score, Sum | ScoreProduct):
        yield from walk(score.left)
        yield from walk(score.right)


def reads_key(score: Score) -> bool:
    """Whether the number of a pair depends on its key."""
    atoms = [x for x in walk(score) if isinstance(x, ATOMS)]
    return any("k" in axes(atom) for atom in atoms)


def weights(score: Score) -> tuple[Weights, ...]:
    """The distinct look-ups of weights."""
    found = {node: None for node in walk(score) if isinstance(node, Weights)}
    return tuple(found)


def integer_operands(score: Score) -> tuple[ir.Operand, ...]:
    """The distinct look-ups of run-time integers."""
    atoms = [x for x in walk(score) if isinstance(x, ATOMS)]
    nodes = (n for atom in atoms for i in indices(atom) for n in ir.walk(i))
    return tuple(dict.fromkeys(n for n in nodes if isinstance(n, ir.Operand)))


def show_score(score: Score) -> str:
    """Prints a score as the Python expression that builds it again."""
    match score:
        case Integer(expr):
            return show(expr)
        case Log(expr):
            return f"log({show(expr)})"
        case Number(value):
            return repr(value)
        case Numbers(values, index):
            return f"table({values})[{show(index)}]"
        case Weights(name, index, running):
            at = f"[{', '.join(map(show, index))}]"
            part = "" if running is None else f".running({running!r})"
            return f"weights({name!r}){part}{at}"
        case Sum(a, b):
            return f"{show_score(a)} + {_tight(b)}"
        case ScoreProduct(a, b):
            return f"{_tight(a)} * {_tight(b)}"
    assert_never(score)


def _tight(score: Score) -> str:
    text = show_score(score)
    atom = isinstance(score, Log | Numbers | Weights)
    if isinstance(score, Number):
        atom = score.value >= 0
    if isinstance(score, Integer):
        atom = isinstance(score.expr, ir.Var | ir.Min | ir.Max | ir.Log2 | ir.Table)
    return text if atom else f"({text})"
