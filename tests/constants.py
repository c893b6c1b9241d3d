"""Finds operations of a traced program on constants alone, which XLA folds slowly."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Operations that only lay out a constant; XLA folds none of them.
FREE = {"iota", "broadcast_in_dim", "reshape", "optimization_barrier", "copy"}
# Operations whose body runs once, on the operands of the equation.
ONCE = {"pjit", "jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2"}
ONCE |= {"checkpoint", "core_call", "custom_vjp_call_jaxpr", "shard_map"}


class Found(NamedTuple):
    """An operation on constants alone, and the bytes of its results."""

    name: str
    shapes: tuple[str, ...]
    nbytes: int


def computed_from_constants(jaxpr: ClosedJaxpr, most: int = 1 << 20) -> list[Found]:
    """The operations on constants whose results have more than ``most`` bytes.

    In a loop, a value that is the same in every step is constant if it is so outside.
    """
    found: list[Found] = []
    _walk(jaxpr.jaxpr, [False] * len(jaxpr.jaxpr.invars), most, found)
    return found


def literals(jaxpr: ClosedJaxpr) -> int:
    """Bytes of the arrays that the program and its nested programs hold."""
    total = sum(np.asarray(x).nbytes for x in jaxpr.consts)
    for eqn in jaxpr.jaxpr.eqns:
        total += sum(map(literals, _closed(eqn.params)))
    return total


def _closed(params: dict[str, Any]) -> list[ClosedJaxpr]:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, ClosedJaxpr))
    return [x for x in leaves if isinstance(x, ClosedJaxpr)]


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    kinds = ClosedJaxpr, Jaxpr
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, kinds))
    bodies = [x for x in leaves if isinstance(x, kinds)]
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in bodies]


def _walk(
    jaxpr: Jaxpr, inputs: list[bool], most: int, found: list[Found]
) -> list[bool]:
    """Whether each output is constant; ``inputs`` says so of the inputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= dict.fromkeys(jaxpr.constvars, True)

    def constant(x: Any) -> bool:
        return isinstance(x, Literal) or known[x]

    for eqn in jaxpr.eqns:
        operands = [constant(x) for x in eqn.invars]
        name, bodies = eqn.primitive.name, _bodies(eqn.params)
        if name in ONCE and bodies:
            outputs = _walk(bodies[0], operands, most, found)
        elif bodies:
            for body in bodies:
                _walk(body, _of_body(name, eqn, body, operands), most, found)
            outputs = [False] * len(eqn.outvars)
        else:
            static = all(operands) and name != "optimization_barrier"
            outputs = [static] * len(eqn.outvars)
            nbytes = sum(_nbytes(x.aval) for x in eqn.outvars)
            if static and name not in FREE and nbytes > most:
                shapes = tuple(str(x.aval) for x in eqn.outvars)
                found.append(Found(name, shapes, nbytes))
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [constant(x) for x in jaxpr.outvars]


def _of_body(name: str, eqn: Any, body: Jaxpr, operands: list[bool]) -> list[bool]:
    """Which inputs of a loop, a branch or a kernel are constant."""
    if name == "scan":
        # jax versions name the operand counts differently, so shapes tell them apart.
        carries = sum(map(_same_shape, eqn.outvars, body.outvars))
        lines = len(body.invars) - sum(map(_same_shape, eqn.invars, body.invars))
        count = len(body.invars) - carries - lines
        return operands[:count] + [False] * (len(body.invars) - count)
    if name == "while":
        counts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        is_body = body is eqn.params["body_jaxpr"].jaxpr
        start = counts[0] if is_body else 0
        count = counts[1] if is_body else counts[0]
        consts = operands[start : start + count]
        return consts + [False] * (len(body.invars) - count)
    if name == "cond":
        return operands[1:]
    return [False] * len(body.invars)


def _same_shape(outside: Any, inside: Any) -> bool:
    return outside.aval.shape == inside.aval.shape


def _nbytes(aval: Any) -> int:
    return int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize
