"""The derivatives of the XLA backend, in both modes and of every order.

Attention is a function ``f`` of its variables ``x`` with the result ``(o, lse)``. Four
functions give all derivatives up to the second order. Each is a loop over the blocks of
the plan:

- ``tangent(x; u) = f'(x) u``, and its transpose ``gradient(x; c) = f'(x)^T c``;
- ``tangent2(x; u, w) = f''(x)[u, w]``, the derivative of ``tangent(x; u)`` along ``w``;
- ``gradient2(x; c, w)``, the derivative of ``gradient(x; c)`` along ``w``: the Hessian
  of ``<c, f>`` times ``w``. The Hessian is symmetric, so this function of ``w`` is its
  own transpose. As a function of ``c`` its transpose is ``tangent2(x; w, .)``.

One primitive represents the four. Its first operands are the point ``x`` with the
results of the forward pass. It is linear in each of the others. The tools of JAX do not
suffice: a ``custom_vjp`` has no forward mode, and JAX's transpose of a ``custom_jvp``
would store the probabilities of all blocks.

The results of the forward pass (``o``, ``lse``, ``total``) are functions of ``x``, not
variables of their own. Derivatives beyond the second use plain JAX over all pairs
(``dense.py``), in quadratic memory.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, assert_never

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.call import (
    Inputs,
    Kept,
    Outputs,
    ScoreValues,
    Vectors,
    named,
    to_backward,
)
from pallas_kernels.varying import alike, aval_like
from pallas_kernels.xla.passes import passes
from pallas_kernels.xla.score_gradient import score_gradient

Kind: TypeAlias = Literal["tangent", "gradient", "tangent2", "gradient2"]


class Variables(NamedTuple):
    """The variables ``x``, or a direction, in which None stands for zero."""

    inputs: Inputs
    scores: ScoreValues


class Point(NamedTuple):
    """The point of a derivative: the arrays of a call and its results."""

    variables: Variables
    kept: Kept
    vectors: Vectors  # without the scores, which are variables
    tests: Any
    lists: Any


class DerivativeRule(NamedTuple):
    """The static part of the primitive.

    ``axes`` has an entry for each enclosing ``vmap``, the innermost first: the size of
    its axis, and for each array of the point whether the array has that axis. The other
    operands and the results have all these axes in front, the outermost first.
    """

    kind: Kind
    call: Any
    # The tree structures of the point and of the linear operands. The latter are
    # Variables and Outputs, with None for zeros.
    point: Any
    linear: Any
    axes: tuple[tuple[int, tuple[bool, ...]], ...] = ()


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(call: Any, inputs: Inputs, vectors: Vectors, tests: Any, lists: Any) -> Kept:
    """The forward pass, differentiable in both modes and to any order.

    The variables are ``inputs`` and, if they are learned, ``vectors.scores``.
    """
    del tests
    return passes(call).forward(inputs, vectors, lists, call)


def _attend_jvp(call: Any, primals: tuple, tangents: tuple) -> tuple[Kept, Kept]:
    inputs, vectors, tests, lists = primals
    kept = named(attend(call, inputs, vectors, tests, lists), call.residual_name)
    variables = Variables(inputs, vectors.scores)
    rest = vectors._replace(scores=ScoreValues())
    point = Point(variables, kept, rest, tests, lists)
    # A None instead of a zero tangent saves the memory and time of that variable.
    moves = Variables(tangents[0], tangents[1].scores)
    if not call.learned_scores:
        moves = moves._replace(scores=jax.tree.map(lambda _: None, moves.scores))
    moves = jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, moves)
    return kept, _moved(kept, _bind("tangent", call, point, moves))


def _moved(kept: Kept, tangent: Any) -> Kept:
    """The tangent of ``kept``; the total is 1 up to rounding, so its tangent is 0."""
    return Kept(tangent.o, tangent.lse, jnp.zeros_like(kept.total))


attend.defjvp(_attend_jvp, symbolic_zeros=True)


derivative_p = Primitive("attention_derivative")
derivative_p.multiple_results = True


def _bind(kind: Kind, call: Any, point: Point, *linear: Any, axes: Any = ()) -> Any:
    """Binds the primitive to trees, and returns the result as a tree."""
    point, linear = alike((point, linear))
    point_leaves, point_tree = jax.tree.flatten(point)
    leaves, tree = jax.tree.flatten(linear)
    rule = DerivativeRule(kind, call, point_tree, tree, axes)
    found = derivative_p.bind(*point_leaves, *leaves, rule=rule)
    return jax.tree.unflatten(jax.tree.structure(_like(kind, point)), found)


def _like(kind: Kind, point: Point) -> Variables | Outputs:
    """Arrays with the structure and the shapes of the result of ``kind``."""
    match kind:
        case "tangent" | "tangent2":
            return point.kept.outputs
        case "gradient" | "gradient2":
            return point.variables
    assert_never(kind)


def _split(rule: DerivativeRule, leaves: Any) -> tuple[Point, tuple]:
    """The trees of the point and of the linear operands from their ``leaves``."""
    count = rule.point.num_leaves
    point = jax.tree.unflatten(rule.point, leaves[:count])
    return point, jax.tree.unflatten(rule.linear, leaves[count:])


def _indices(rule: DerivativeRule) -> tuple[Point, tuple]:
    """The same trees, with the index of each operand as its leaf."""
    count = rule.point.num_leaves + rule.linear.num_leaves
    return _split(rule, list(range(count)))


def _run(*leaves: Any, rule: DerivativeRule, pairs: bool = False) -> list[jax.Array]:
    """Evaluates the primitive, by loops over blocks or over all ``pairs``."""
    function = over_pairs if pairs else over_blocks

    def run(*leaves: Any) -> list[jax.Array]:
        point, linear = _split(rule, leaves)
        return jax.tree.leaves(function(rule.kind, rule.call, point, linear))

    for size, has_axis in rule.axes:
        in_axes = [0 if has else None for has in has_axis]
        in_axes += [0] * rule.linear.num_leaves
        run = jax.vmap(run, in_axes=tuple(in_axes), axis_size=size)
    return run(*leaves)


def over_blocks(
    kind: Kind, call: Any, point: Point, linear: tuple
) -> Variables | Outputs:
    """The four functions of the module docstring, in memory linear in the lengths."""
    x, kept, vectors, _, lists = point
    vectors = vectors._replace(scores=x.scores)
    match kind:
        case "tangent":
            (u,) = linear
            moved = _filled(u.scores, x.scores) if _has_any(u.scores) else None
            u = _filled(u.inputs, x.inputs), moved
            return passes(call).tangent(x.inputs, u, kept, vectors, lists, call)
        case "gradient":
            cotangent = _filled(linear[0], kept.outputs)
            args = *to_backward(x.inputs, kept, cotangent), vectors, lists, call
            scores = jax.tree.map(jnp.zeros_like, x.scores)
            if call.learned_scores:
                scores = score_gradient(*args)
            return Variables(Inputs(*passes(call).backward(*args)), scores)
        case "tangent2" | "gradient2":
            other, w = linear
            first = "tangent" if kind == "tangent2" else "gradient"

            def at(x: Variables, kept: Kept) -> Variables | Outputs:
                near = point._replace(variables=x, kept=kept)
                return over_blocks(first, call, near, (other,))

            moved = _moved(kept, over_blocks("tangent", call, point, (w,)))
            return jax.jvp(at, (x, kept), (_filled(w, x), moved))[1]
    assert_never(kind)


def over_pairs(
    kind: Kind, call: Any, point: Point, linear: tuple
) -> Variables | Outputs:
    """The four functions in plain JAX, differentiable to any order."""
    variables, kept, vectors, tests, lists = point

    def f(x: Variables) -> Outputs:
        own = vectors._replace(scores=x.scores)
        return passes(call).over_pairs(x.inputs, own, tests, lists, call)

    match kind:
        case "tangent":
            return jax.jvp(f, (variables,), (_filled(linear[0], variables),))[1]
        case "gradient":
            return jax.vjp(f, variables)[1](_filled(linear[0], kept.outputs))[0]
        case "tangent2" | "gradient2":
            other, w = linear
            first = "tangent" if kind == "tangent2" else "gradient"

            def at(x: Variables) -> Variables | Outputs:
                near = point._replace(variables=x)
                return over_pairs(first, call, near, (other,))

            return jax.jvp(at, (variables,), (_filled(w, variables),))[1]
    assert_never(kind)


def _is_none(x: Any) -> bool:
    return x is None


def _filled(x: Any, like: Any) -> Any:
    """``x`` with zeros for None."""

    def of(a: Any, b: Any) -> Any:
        return jnp.zeros_like(b) if a is None else a

    return jax.tree.map(of, x, like, is_leaf=_is_none)


def _has_any(x: Any) -> bool:
    return bool(jax.tree.leaves(x))


def _impl(*leaves: Any, rule: DerivativeRule) -> list[jax.Array]:
    return _run(*leaves, rule=rule)


def _abstract(*leaves: Any, rule: DerivativeRule) -> list[jax.core.ShapedArray]:
    point, _ = _indices(rule)
    found = []
    for index in jax.tree.leaves(_like(rule.kind, point)):
        shape = _with_axes(leaves[index].shape, rule, index)
        found.append(aval_like(shape, leaves[index].dtype, leaves[index]))
    return found


def _with_axes(
    shape: tuple[int, ...], rule: DerivativeRule, index: int
) -> tuple[int, ...]:
    """The shape of an array of the point with the axes of every ``vmap``."""
    own = sum(has_axis[index] for _, has_axis in rule.axes)
    return (*(size for size, _ in reversed(rule.axes)), *shape[own:])


def _widened(x: jax.Array, rule: DerivativeRule, index: int) -> jax.Array:
    """The tangent of an array of the point with the axes of every ``vmap``."""
    lead = [slice(None) if has[index] else None for _, has in reversed(rule.axes)]
    return jnp.broadcast_to(x[tuple(lead)], _with_axes(x.shape, rule, index))


def _jvp(primals: Any, tangents: Any, *, rule: DerivativeRule) -> tuple[Any, Any]:
    results = derivative_p.bind(*primals, rule=rule)
    point, linear = _split(rule, primals)
    moves = [None if isinstance(t, ad.Zero) else t for t in tangents]
    point_moves, linear_moves = _split(rule, moves)

    def bound(kind: Kind, *linear: Any) -> Any:
        return _bind(kind, rule.call, point, *linear, axes=rule.axes)

    terms = [
        bound(rule.kind, *linear[:i], move, *linear[i + 1 :])
        for i, move in enumerate(linear_moves)
        if _has_any(move)
    ]
    w = point_moves.variables
    if _has_any(w):

        def wide(x: Any, index: int) -> Any:
            return None if x is None else _widened(x, rule, index)

        indices = _indices(rule)[0].variables
        wide_w = jax.tree.map(wide, w, indices, is_leaf=_is_none)
        match rule.kind:
            case "tangent":
                terms.append(bound("tangent2", *linear, wide_w))
            case "gradient":
                terms.append(bound("gradient2", *linear, wide_w))
            case "tangent2" | "gradient2":
                terms.append(_beyond(point, linear, w, rule))
            case _:
                assert_never(rule.kind)
    if not terms:
        return results, [ad.Zero(jax.typeof(x)) for x in results]
    parts = zip(*(jax.tree.leaves(term) for term in terms), strict=True)
    return results, [sum(x[1:], x[0]) for x in parts]


def _beyond(
    point: Point, linear: tuple, w: Any, rule: DerivativeRule
) -> list[jax.Array]:
    """The derivative of a second derivative along ``w``."""

    def at(x: Variables) -> list[jax.Array]:
        leaves = jax.tree.leaves((point._replace(variables=x), linear))
        return _run(*leaves, rule=rule, pairs=True)

    x = point.variables
    return jax.jvp(at, (x,), (_filled(w, x),))[1]


def _transpose(cotangents: Any, *leaves: Any, rule: DerivativeRule) -> list[Any]:
    found: list[Any] = [None] * len(leaves)
    values = [None if isinstance(c, ad.Zero) else c for c in cotangents]
    if all(c is None for c in values):
        return found
    undefined = [ad.is_undefined_primal(x) for x in leaves]
    point, linear = _split(rule, leaves)
    at, asked = next(
        (i, part)
        for i, part in enumerate(_indices(rule)[1])
        if any(undefined[index] for index in jax.tree.leaves(part))
    )
    others = linear[:at] + linear[at + 1 :]
    tree = jax.tree.structure(_like(rule.kind, point))
    c = jax.tree.unflatten(tree, values)
    kind, operands = _transposed(rule.kind, at, others, c)
    gradient = _bind(kind, rule.call, point, *operands, axes=rule.axes)
    asked = jax.tree.leaves(asked, is_leaf=_is_none)
    for index, value in zip(asked, jax.tree.leaves(gradient), strict=True):
        if index is not None and undefined[index]:
            found[index] = value
    return found


def _transposed(kind: Kind, at: int, others: tuple, c: Any) -> tuple[Kind, tuple]:
    """The transpose in linear operand ``at``, applied to ``c`` (module docstring)."""
    match kind:
        case "tangent":
            return "gradient", (c,)
        case "gradient":
            return "tangent", (c,)
        case "tangent2":
            return "gradient2", (c, *others)
        case "gradient2":
            return (
                ("tangent2", (*others, c)) if at == 0 else ("gradient2", (*others, c))
            )
    assert_never(kind)


def _batch(leaves: Any, dims: Any, *, rule: DerivativeRule) -> tuple[Any, Any]:
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
    count = rule.point.num_leaves
    has_axis = tuple(d is not None for d in dims[:count])

    def in_front(index: int) -> Any:
        x, d = leaves[index], dims[index]
        if d is not None:
            return jnp.moveaxis(x, d, 0)
        return x if index < count else jnp.broadcast_to(x, (size, *x.shape))

    leaves = [in_front(index) for index in range(len(leaves))]
    outer = rule._replace(axes=(*rule.axes, (size, has_axis)))
    results = derivative_p.bind(*leaves, rule=outer)
    return results, [0] * len(results)


derivative_p.def_impl(jax.jit(_impl, static_argnames=("rule",)))
derivative_p.def_abstract_eval(_abstract)
mlir.register_lowering(derivative_p, mlir.lower_fun(_impl, multiple_results=True))
ad.primitive_jvps[derivative_p] = _jvp
ad.primitive_transposes[derivative_p] = _transpose
batching.primitive_batchers[derivative_p] = _batch
