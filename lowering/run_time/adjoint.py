"""Linear functions with a given transpose, in both modes of differentiation.

JAX transposes a gather into a scatter-add, whose order of additions the device chooses.
If the transpose is known to be a gather too, or a sum in a fixed order, it is given
here. A ``custom_vjp`` could do the same, but has no forward mode.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.varying import alike, aval_like


class LinearRule(NamedTuple):
    """The static parameters of the primitive.

    ``run`` and ``transpose`` are functions of a module, so that rules compare equal.
    ``axes`` has an entry for each ``vmap`` around the call, the innermost first: its
    size, and for each of the other arrays whether it has that axis. The argument in
    which the function is linear has all of these axes, in front.
    """

    run: Callable[..., jax.Array]
    transpose: Callable[..., jax.Array]
    fixed: Any  # the structure of the other operands
    dtype: Any  # of the result
    axes: tuple[tuple[int, tuple[bool, ...]], ...] = ()


def linear(
    run: Callable[..., jax.Array],
    transpose: Callable[..., jax.Array],
    x: jax.Array,
    *fixed: Any,
    dtype: Any = None,
) -> jax.Array:
    """``run(x, *fixed)``, which is linear in ``x`` and has the given transpose.

    ``transpose(y, *fixed)`` takes an array shaped like the result and returns one
    shaped like ``x``. ``fixed`` are pytrees of integers. The result has the dtype of
    ``x``, or ``dtype``.
    """
    leaves, tree = jax.tree.flatten(fixed)
    x, leaves = alike((x, leaves))
    rule = LinearRule(run, transpose, tree, jnp.dtype(dtype or x.dtype))
    return linear_p.bind(x, *leaves, rule=rule)


linear_p = Primitive("with_adjoint")


def _run(x: Any, *leaves: Any, rule: LinearRule) -> jax.Array:
    def run(x: Any, *leaves: Any) -> jax.Array:
        fixed = jax.tree.unflatten(rule.fixed, leaves)
        return rule.run(x, *fixed).astype(rule.dtype)

    for size, has_axis in rule.axes:
        in_axes = [0 if has else None for has in has_axis]
        run = jax.vmap(run, in_axes=(0, *in_axes), axis_size=size)
    return run(x, *leaves)


def _abstract(x: Any, *leaves: Any, rule: LinearRule) -> jax.core.ShapedArray:
    like = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (x, *leaves)]
    found = jax.eval_shape(lambda *y: _run(*y, rule=rule), *like)
    return aval_like(found.shape, found.dtype, x)


def _jvp(primals: Any, tangents: Any, *, rule: LinearRule) -> tuple[Any, Any]:
    x, *leaves = primals
    result = linear_p.bind(x, *leaves, rule=rule)
    change = tangents[0]
    if isinstance(change, ad.Zero):
        return result, ad.Zero(jax.typeof(result))
    return result, linear_p.bind(change, *leaves, rule=rule)


def _transpose(cotangent: Any, x: Any, *leaves: Any, rule: LinearRule) -> list[Any]:
    nothing = [None] * len(leaves)
    if isinstance(cotangent, ad.Zero):
        return [None, *nothing]
    turned = rule._replace(run=rule.transpose, transpose=rule.run, dtype=x.aval.dtype)
    return [linear_p.bind(cotangent, *leaves, rule=turned), *nothing]


def _batch(operands: Any, dims: Any, *, rule: LinearRule) -> tuple[jax.Array, int]:
    pairs = list(zip(operands, dims, strict=True))
    size = next(x.shape[d] for x, d in pairs if d is not None)
    x, *leaves = (x if d is None else jnp.moveaxis(x, d, 0) for x, d in pairs)
    if dims[0] is None:
        x = jnp.broadcast_to(x, (size, *x.shape))
    has_axis = tuple(d is not None for d in dims[1:])
    outer = rule._replace(axes=(*rule.axes, (size, has_axis)))
    return linear_p.bind(x, *leaves, rule=outer), 0


linear_p.def_impl(jax.jit(_run, static_argnames=("rule",)))
linear_p.def_abstract_eval(_abstract)
mlir.register_lowering(linear_p, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
