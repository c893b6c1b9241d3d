"""Block specs and launch options of the Triton kernels of linear attention."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.chunk import ChunkKeys, State
from pallas_kernels.linear.inverse import kernel_solve
from pallas_kernels.linear.marks import Marks, pairs
from pallas_kernels.linear.products import (
    Ops,
    column_index,
    kernel_dot,
    number,
    plain_dot,
    row_index,
)
from pallas_kernels.varying import shape_like


def options(call: LinearCall) -> dict[str, Any]:
    """The launch options of a ``pallas_call``."""
    params = plgpu.CompilerParams(num_warps=call.num_warps, num_stages=call.num_stages)
    return {"compiler_params": params, "interpret": call.interpret}


def operations(dtype: Any) -> Ops:
    """The operations of a chunk in a kernel; products round to ``dtype``."""
    dot = plain_dot(dtype)
    return Ops(dot, partial(kernel_solve, dot), _swapped, column)


def differentiated(dtype: Any) -> Ops:
    """``operations`` for a function whose ``jax.vjp`` a kernel takes.

    All its arguments must be differentiated: what Triton sees of a ``custom_vjp`` is
    its rules alone.
    """
    solve = partial(kernel_solve, plain_dot(dtype))
    return Ops(kernel_dot(dtype), solve, _swapped_back, column)


def _swapped(x: jax.Array, b: int) -> jax.Array:
    """``products.swapped_halves`` as an exact product, since Triton moves no rows."""
    shape = x.shape[0], x.shape[0]
    there = (row_index(shape) ^ b) == column_index(shape)
    one = jnp.where(there, number(1.0, x), number(0.0, x))
    return plain_dot(x.dtype)(one, x, (1, 0))


_swapped_back = jax.custom_vjp(_swapped, nondiff_argnums=(1,))
# The exchange is its own transpose.
_swapped_back.defvjp(
    lambda x, b: (_swapped(x, b), None), lambda b, _, g: (_swapped(g, b),)
)


def column(row: jax.Array) -> jax.Array:
    """``[1, n]`` as ``[n, 1]``."""
    return jnp.sum(row, axis=0)[:, None]


def struct(x: jax.Array, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape of a result like ``x``."""
    return shape_like(x.shape, dtype, x)


def chunk_specs(chunks: ChunkInputs, call: LinearCall, members: int) -> ChunkInputs:
    """The specs of a chunk: keys, and the queries of ``members`` of the group.

    The state is not among them.
    """
    mark = pl.BlockSpec((None, None, call.chunk), lambda c, h, g: (h, c, 0))
    of_keys = chunks._replace(q=None, marks=Marks(), state=None)
    keys = jax.tree.map(partial(keys_spec, call=call), of_keys)
    return keys._replace(
        q=row_specs(ChunkOutputs(chunks.q, None, None), call, members).out,
        marks=jax.tree.map(lambda _: mark, chunks.marks),
    )


def keys_spec(x: Any, call: LinearCall) -> pl.BlockSpec:
    """The spec of a chunk of ``[heads, padded, n]``."""
    return pl.BlockSpec((None, call.chunk, x.shape[-1]), lambda c, h, g: (h, c, 0))


def row_specs(rows: ChunkOutputs, call: LinearCall, members: int) -> ChunkOutputs:
    """The specs of a chunk of outputs of ``members`` of the group, but the state."""
    shape = None, members, call.chunk
    out = pl.BlockSpec((*shape, rows.out.shape[-1]), lambda c, h, g: (h, g, c, 0))
    total = pl.BlockSpec(shape, lambda c, h, g: (h, g, c))
    return ChunkOutputs(out, None if rows.total is None else total, None)


def state_specs(states: State) -> State:
    """The specs of the state of a chunk, of states ``[heads, chunks, ...]``."""

    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda c, h, g: (h, c, 0, 0))

    return jax.tree.map(spec, states)


def keys_of(refs: ChunkInputs) -> ChunkKeys:
    """The keys of a chunk as f32 values."""

    def value(ref: Any) -> Any:
        return None if ref is None else ref[...].astype(jnp.float32)

    marks = Marks(*(None if ref is None else ref[...] for ref in refs.marks))
    k, v, erase, gate = map(value, refs[1:5])
    return ChunkKeys(k, v, erase, gate, pairs(marks))


def values(refs: State) -> State:
    """The arrays behind references."""
    return jax.tree.map(lambda ref: ref[...], refs)
