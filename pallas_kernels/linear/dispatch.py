"""Runs linear attention on a chosen backend and defines its gradient.

JAX differentiates the "xla" backend. Each kernel has a backward kernel, and second
derivatives use the "xla" backend. The forward rule of each ``custom_vjp`` calls the
``custom_vjp`` itself, not the raw kernel, so that a second derivative finds a rule.
"""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear import marks, tpu, triton, xla
from pallas_kernels.linear.call import (
    ChunkInputs,
    ChunkOutputs,
    LinearCall,
    LinearInputs,
    LinearOutputs,
)
from pallas_kernels.linear.chunk import State
from pallas_kernels.linear.marks import Marks
from pallas_kernels.precision import wide
from pallas_kernels.varying import alike

KERNELS: dict[str, ModuleType] = {"tpu": tpu, "triton": triton}


def attend(inputs: LinearInputs, call: LinearCall, *, impl: str) -> LinearOutputs:
    """Reads the state at the position of each query.

    It works under ``jit``, ``grad``, ``vmap`` and ``jax.checkpoint``; on "xla" also
    under ``jvp``. Lengths need not be multiples of ``call.step``.
    """
    batch, heads, group, seq, _ = inputs.q.shape
    copies = 1
    if impl == "tpu":
        copies = group // tpu.members_of(group, call.step)
        inputs = _copied_keys(inputs, copies)
    chunks = alike(chunked(inputs, call))
    rows = xla.forward(chunks, call) if impl == "xla" else _attend(impl, call, chunks)

    def shaped(x: Any, *rest: int) -> Any:
        return x[:, :, :seq].reshape(batch, heads, group, seq, *rest)

    def first(x: Any) -> Any:
        return x.reshape(batch, heads, copies, *x.shape[1:])[:, :, 0]

    total = None if rows.total is None else shaped(rows.total)
    state = jax.tree.map(first, rows.state)
    return LinearOutputs(shaped(rows.out, rows.out.shape[-1]), total, state)


def _copied_keys(inputs: LinearInputs, copies: int) -> LinearInputs:
    """Splits each group of query heads in ``copies``, each with its own keys."""
    if copies == 1:
        return inputs
    batch, heads, group, *rest = inputs.q.shape
    q = inputs.q.reshape(batch, heads * copies, group // copies, *rest)

    def repeated(x: Any) -> Any:
        return jnp.repeat(x, copies, axis=1)

    k, v, erase, state = jax.tree.map(
        repeated, (inputs.k, inputs.v, inputs.erase, inputs.state)
    )
    decay = inputs.log_decay
    if decay is not None and decay.shape[1] > 1:
        decay = repeated(decay)
    return LinearInputs(q, k, v, erase, decay, inputs.starts, state)


def final_state(inputs: LinearInputs, call: LinearCall) -> State:
    """The state after all keys, f32; each array is ``[batch, heads, ...]``."""
    batch, heads = inputs.k.shape[:2]
    state = xla.final_state(alike(chunked(inputs, call)), call)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), state)


def chunked(inputs: LinearInputs, call: LinearCall) -> ChunkInputs:
    """The arrays with flat heads, padded to whole chunks."""
    batch, heads, _, seq, _ = inputs.q.shape
    chunk, dtype = call.chunk, wide(inputs.q.dtype)

    def padded(x: Any, axis: int) -> Any:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -seq % call.step)
        return jnp.pad(x, widths) if seq % call.step else x

    def flat(x: Any, axis: int) -> Any:
        return padded(x, axis).reshape(batch * heads, *x.shape[2:axis], -1, x.shape[-1])

    def per_head(x: Any) -> Any:
        x = jnp.broadcast_to(x, (batch, heads, *x.shape[2:]))
        return padded(x.reshape(batch * heads, *x.shape[2:]), 1)

    decay, starts = inputs.log_decay, inputs.starts
    decay = None if decay is None else per_head(decay)
    by_channel = decay is not None and decay.ndim == 3
    starts = None if starts is None else per_head(starts[:, None])
    return ChunkInputs(
        flat(inputs.q, 3),
        flat(inputs.k, 2),
        flat(inputs.v, 2),
        None if inputs.erase is None else flat(inputs.erase, 2),
        marks.clipped(decay).astype(dtype) if by_channel else None,
        marks.of_chunks(None if by_channel else decay, starts, chunk, dtype),
        _start(inputs, call.rule.eps is not None),
    )


def _start(inputs: LinearInputs, normalise: bool) -> State:
    """The state before the first key, with flat heads."""
    batch, heads, _, features = inputs.k.shape
    flat, dtype = batch * heads, wide(inputs.q.dtype)
    if inputs.state is None:
        s = jnp.zeros((flat, features, inputs.v.shape[-1]), dtype)
        return State(s, jnp.zeros((flat, 1, features), dtype) if normalise else None)
    return jax.tree.map(
        lambda x: x.astype(dtype).reshape(flat, *x.shape[2:]), inputs.state
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(impl: str, call: LinearCall, chunks: ChunkInputs) -> ChunkOutputs:
    return KERNELS[impl].forward(chunks, call)


def _attend_fwd(
    impl: str, call: LinearCall, chunks: ChunkInputs
) -> tuple[ChunkOutputs, ChunkInputs]:
    return _attend(impl, call, chunks), chunks


def _attend_bwd(
    impl: str, call: LinearCall, chunks: ChunkInputs, cotangent: ChunkOutputs
) -> tuple[ChunkInputs]:
    return (_backward(impl, call, chunks, cotangent),)


_attend.defvjp(_attend_fwd, _attend_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _backward(
    impl: str, call: LinearCall, chunks: ChunkInputs, cotangent: ChunkOutputs
) -> ChunkInputs:
    return KERNELS[impl].backward(chunks, cotangent, call)


def _backward_fwd(
    impl: str, call: LinearCall, chunks: ChunkInputs, cotangent: ChunkOutputs
) -> tuple[ChunkInputs, Any]:
    return _backward(impl, call, chunks, cotangent), (chunks, cotangent)


def _backward_bwd(
    impl: str, call: LinearCall, residuals: Any, cotangent: ChunkInputs
) -> tuple:
    del impl
    _, pull = jax.vjp(partial(_twin, call), *residuals)
    return pull(cotangent)


_backward.defvjp(_backward_fwd, _backward_bwd)


def _twin(
    call: LinearCall, chunks: ChunkInputs, cotangent: ChunkOutputs
) -> ChunkInputs:
    """The results of a backward kernel, computed in plain JAX."""
    _, pull = jax.vjp(partial(xla.forward, call=call), chunks)
    (found,) = pull(cotangent)
    return found._replace(marks=Marks(fine=found.marks.fine))
