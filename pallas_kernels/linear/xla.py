"""Linear attention as a scan over chunks in plain JAX, for CPUs.

JAX differentiates it, in both modes and to any order. A reverse pass stores the state
at the start of every chunk and computes the rest again, so its memory is linear in the
length.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear import algebra
from pallas_kernels.linear.algebra import ChunkKeys, Marks, Recurrence, State
from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.marks import pairs
from pallas_kernels.precision import wide, widened
from pallas_kernels.varying import vary


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries."""
    rule, dtype = call.rule, chunks.q.dtype
    heads, group, padded, features = chunks.q.shape
    head_dim_v = chunks.v.shape[-1]

    def body(state: State, x: ChunkInputs) -> tuple[State, ChunkOutputs]:
        q, keys = widened(x.q), keys_of(x)
        out, total = _read(rule, q, keys, state)
        if total is not None:
            total = total[..., 0]
        return _write(rule, keys, state), ChunkOutputs(out.astype(dtype), total)

    # XLA compiles the body of a scan apart, so CSE need not be prevented.
    body = jax.checkpoint(body, prevent_cse=False)
    start = vary(empty(rule, heads, features, head_dim_v, wide(dtype)), chunks.k)
    _, (out, total) = jax.lax.scan(body, start, by_chunk(chunks, call.chunk))
    out = jnp.moveaxis(out, 0, 2).reshape(heads, group, padded, head_dim_v)
    if total is not None:
        total = jnp.moveaxis(total, 0, 2).reshape(heads, group, padded)
    return ChunkOutputs(out, total)


def final_state(chunks: ChunkInputs, call: LinearCall) -> State:
    """The state after all keys, with an axis of heads in front."""
    heads, _, features = chunks.k.shape
    sizes = heads, features, chunks.v.shape[-1]
    state = vary(empty(call.rule, *sizes, wide(chunks.k.dtype)), chunks.k)

    def body(state: State, x: ChunkInputs) -> tuple[State, None]:
        return _write(call.rule, keys_of(x), state), None

    body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, state, by_chunk(chunks, call.chunk))[0]


def _read(
    rule: Recurrence, q: jax.Array, keys: ChunkKeys, state: State
) -> tuple[jax.Array, jax.Array | None]:
    """``algebra.read`` for each key head and each query head of its group."""
    member = jax.vmap(
        partial(algebra.read, rule, algebra.plain_dot(q.dtype)), in_axes=(0, None, None)
    )
    return jax.vmap(member)(q, keys, state)


def _write(rule: Recurrence, keys: ChunkKeys, state: State) -> State:
    dot = algebra.plain_dot(keys.k.dtype)
    return jax.vmap(partial(algebra.write, rule, dot))(keys, state)


def empty(
    rule: Recurrence, heads: Any, features: int, head_dim_v: int, dtype: Any
) -> State:
    """The state before the first key, with an axis of heads in front."""
    s = jnp.zeros((heads, features, head_dim_v), dtype)
    z = jnp.zeros((heads, 1, features), dtype)
    return State(s, None if rule.eps is None else z)


def keys_of(x: ChunkInputs) -> ChunkKeys:
    """The ``ChunkKeys`` of ``x`` in the dtype of sums; ``x`` may have further axes."""
    return ChunkKeys(widened(x.k), widened(x.v), pairs(x.marks))


def by_chunk(chunks: ChunkInputs, chunk: int) -> ChunkInputs:
    """The arrays with an axis of chunks in front."""

    def split(x: jax.Array) -> jax.Array:
        *lead, padded, size = x.shape
        x = x.reshape(*lead, padded // chunk, chunk, size)
        return jnp.moveaxis(x, -3, 0)

    marks = Marks(*(None if x is None else x.swapaxes(0, 1) for x in chunks.marks))
    return ChunkInputs(split(chunks.q), split(chunks.k), split(chunks.v), marks)
