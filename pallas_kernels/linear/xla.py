"""Linear attention as a scan over chunks in plain JAX, for CPUs.

JAX differentiates it, in both modes and to any order. A reverse pass stores the state
at the start of every chunk and computes the rest again, so its memory is linear in the
length.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.chunk import ChunkKeys, State, advance, of_chunk, write
from pallas_kernels.linear.inverse import solve
from pallas_kernels.linear.marks import Marks, pairs
from pallas_kernels.linear.products import Ops, plain_dot, swapped_halves
from pallas_kernels.precision import widened
from pallas_kernels.varying import vary


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries, and the state after all keys."""
    dtype, ops = chunks.q.dtype, operations(chunks.q.dtype)
    heads, group, padded, _ = chunks.q.shape

    def one_head(q: Any, keys: ChunkKeys, state: State) -> tuple[Any, Any, State]:
        rows = q.reshape(-1, q.shape[-1])
        out, total, state = of_chunk(call.rule, ops, rows, keys, state)
        return out.reshape(*q.shape[:2], -1), total, state

    def body(state: State, x: ChunkInputs) -> tuple[State, tuple]:
        q, keys = widened(x.q), keys_of(x)
        out, total, state = jax.vmap(one_head)(q, keys, state)
        return state, (out.astype(dtype), total)

    # XLA compiles the body of a scan apart, so CSE need not be prevented.
    body = jax.checkpoint(body, prevent_cse=False)
    start = vary(chunks.state, chunks.k)
    state, (out, total) = jax.lax.scan(body, start, by_chunk(chunks, call.chunk))
    out = jnp.moveaxis(out, 0, 2).reshape(heads, group, padded, -1)
    if total is not None:
        total = total.reshape(-1, heads, group, call.chunk)
        total = jnp.moveaxis(total, 0, 2).reshape(heads, group, padded)
    return ChunkOutputs(out, total, state)


def final_state(chunks: ChunkInputs, call: LinearCall) -> State:
    """The state after all keys, with an axis of heads in front."""
    ops = operations(chunks.k.dtype)

    def one_head(keys: ChunkKeys, state: State) -> State:
        return advance(ops, keys, write(call.rule, ops, keys, state), state)

    def body(state: State, x: ChunkInputs) -> tuple[State, None]:
        return jax.vmap(one_head)(keys_of(x), state), None

    body = jax.checkpoint(body, prevent_cse=False)
    start = vary(chunks.state, chunks.k)
    return jax.lax.scan(body, start, by_chunk(chunks, call.chunk))[0]


def operations(dtype: Any) -> Ops:
    """The operations of a chunk in plain JAX, differentiable in both modes."""
    dot = plain_dot(dtype)
    return Ops(dot, partial(solve, dot), swapped_halves, jnp.transpose)


def keys_of(x: ChunkInputs) -> ChunkKeys:
    """The ``ChunkKeys`` of ``x`` in the dtype of sums; ``x`` may have further axes."""
    erase = None if x.erase is None else widened(x.erase)
    return ChunkKeys(widened(x.k), widened(x.v), erase, x.gate, pairs(x.marks))


def by_chunk(chunks: ChunkInputs, chunk: int) -> ChunkInputs:
    """The arrays with an axis of chunks in front, without the state."""

    def split(x: jax.Array) -> jax.Array:
        *lead, padded, size = x.shape
        x = x.reshape(*lead, padded // chunk, chunk, size)
        return jnp.moveaxis(x, -3, 0)

    marks = Marks(*(None if x is None else x.swapaxes(0, 1) for x in chunks.marks))
    split_up = jax.tree.map(split, chunks._replace(marks=Marks(), state=None))
    return split_up._replace(marks=marks)
