"""Lists the softmax calls that a term is made of, without running them.

``lower`` shows the stages, the plan and the blocks of each. The rules of terms stay the
only place that says how a term is taken apart.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jaxtyping import Array

from pallas_kernels.precision import wide
from sadsl.run.options import Options
from sadsl.run.types import QKV


class SoftmaxCall(NamedTuple):
    """The static part of a softmax call, and the shapes of its q, k and v."""

    options: Options
    shapes: tuple[jax.ShapeDtypeStruct, ...]


_calls: ContextVar[list[SoftmaxCall] | None] = ContextVar("softmax calls", default=None)


def softmax_calls(fn: Callable[..., Any], *shapes: Any) -> tuple[SoftmaxCall, ...]:
    """The softmax calls in ``fn(*shapes)``, in the order in which they would run."""
    with _observing() as calls:
        jax.eval_shape(fn, *shapes)
    return tuple(calls)


@contextmanager
def _observing() -> Generator[list[SoftmaxCall], None, None]:
    calls: list[SoftmaxCall] = []
    token = _calls.set(calls)
    # What jax keeps of a trace is kept by mesh. With a mesh of its own, nothing that is
    # traced here, without kernels, can become part of a call that runs.
    mesh = AbstractMesh((1,), ("observed",), (AxisType.Auto,))
    try:
        with use_abstract_mesh(mesh):
            yield calls
    finally:
        _calls.reset(token)


def noted(options: Options, inputs: QKV) -> tuple[Array, Array] | None:
    """Notes a softmax call, and returns zeros for its output and lse.

    None if nobody observes: then the call runs.
    """
    calls = _calls.get()
    if calls is None:
        return None
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    calls.append(SoftmaxCall(options, shapes))
    q, _, v = inputs
    out = jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    return out, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), wide(q.dtype))
