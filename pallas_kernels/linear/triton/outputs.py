"""The outputs of each chunk from the state at its start, and their derivatives.

A chunk's keys write known values ``U`` (``states``), so a query reads them as plain
linear attention does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.chunk import (
    ChunkKeys,
    State,
    Written,
    advance,
    read,
    write,
)
from pallas_kernels.linear.gates import decay_of
from pallas_kernels.linear.marks import Marks
from pallas_kernels.linear.triton import launch
from pallas_kernels.linear.triton.launch import keys_of, operations, values
from pallas_kernels.linear.triton.states import Ends, Own, States
from pallas_kernels.loops import repeat
from pallas_kernels.varying import shape_like


def forward(
    chunks: ChunkInputs, states: States, call: LinearCall, dtype: Any
) -> tuple[Any, Any]:
    """``out [heads, group, padded, head_dim_v]`` and the normalisers, or None."""
    heads, group, padded, _ = chunks.q.shape
    row = heads, group, padded
    out = shape_like((*row, chunks.v.shape[-1]), dtype, chunks.q)
    total = None
    if call.rule.eps is not None:
        total = shape_like(row, jnp.float32, chunks.q)
    rows = launch.row_specs(ChunkOutputs(out, total, None), call, 1)
    return pl.pallas_call(
        partial(_forward_kernel, call=call),
        grid=(padded // call.chunk, heads, group),
        in_specs=[
            launch.chunk_specs(chunks, call, 1)._replace(erase=None),
            launch.keys_spec(states.values, call),
            launch.state_specs(states.starts),
        ],
        out_specs=[rows.out, rows.total],
        out_shape=[out, total],
        name="sadsl_linear_forward",
        **launch.options(call),
    )(chunks._replace(erase=None, state=None), states.values, states.starts)


def backward_queries(
    chunks: ChunkInputs, states: States, cotangent: ChunkOutputs, call: LinearCall
) -> tuple[Any, Own]:
    """The cotangents of the queries, and those that reads cause in their chunk."""
    heads, group, padded, _ = chunks.q.shape
    chunks = chunks._replace(erase=None, state=None)
    specs = launch.chunk_specs(chunks, call, group)
    of_values = launch.keys_spec(states.values, call)
    of_states = launch.state_specs(states.starts)
    dq, dvalues, dstates = pl.pallas_call(
        partial(_queries_kernel, call=call),
        grid=(padded // call.chunk, heads, 1),
        in_specs=[
            specs, of_values, of_states, launch.row_specs(cotangent, call, group)
        ],
        out_specs=[specs.q, of_values, of_states],
        out_shape=[
            launch.struct(chunks.q),
            launch.struct(states.values),
            jax.tree.map(launch.struct, states.starts),
        ],
        name="sadsl_linear_backward_q",
        **launch.options(call),
    )(chunks, states.values, states.starts, cotangent._replace(state=None))  # fmt: skip
    return dq, Own(dstates, dvalues)


def backward_keys(
    chunks: ChunkInputs,
    states: States,
    cotangent: ChunkOutputs,
    ends: Ends,
    call: LinearCall,
) -> ChunkInputs:
    """The cotangents of keys, values, erase vectors and log-decays."""
    heads, group, padded, _ = chunks.q.shape
    chunks = chunks._replace(state=None)
    specs = launch.chunk_specs(chunks, call, group)
    of_values = launch.keys_spec(states.values, call)
    of_states = launch.state_specs(states.starts)
    out_specs = specs._replace(q=None, marks=Marks(specs.marks.fine))
    shapes = jax.tree.map(
        launch.struct, chunks._replace(q=None, marks=Marks(chunks.marks.fine))
    )
    if chunks.erase is None:
        # Then the values that keys write are v itself.
        out_specs, shapes = out_specs._replace(v=None), shapes._replace(v=None)
    (found,) = pl.pallas_call(
        partial(_keys_kernel, call=call),
        grid=(padded // call.chunk, heads, 1),
        in_specs=[
            specs, of_values, of_states,
            launch.row_specs(cotangent, call, group), of_values, of_states,
        ],
        out_specs=[out_specs],
        out_shape=[shapes],
        name="sadsl_linear_backward_kv",
        **launch.options(call),
    )(
        chunks, states.values, states.starts,
        cotangent._replace(state=None), ends.values, ends.ends,
    )  # fmt: skip
    return found._replace(v=ends.values) if chunks.erase is None else found


# --- kernels: a program has one chunk of one head ---


def _forward_kernel(
    refs: ChunkInputs, values_ref: Any, states: State, out_ref: Any, total_ref: Any,
    *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes ``out [1, chunk, head_dim_v]`` and ``total [1, chunk]`` of a query head.

    ``refs`` are ``q [1, chunk, features]``, ``k`` and ``gate [chunk, features]``, ``v``
    and the written values ``[chunk, head_dim_v]``, and marks ``[chunk]``; the state at
    the start is f32 ``[features, head_dim_v]`` and ``[1, features]``.
    """
    assert refs.q.shape == (1, *refs.k.shape)
    assert out_ref.shape == (1, *values_ref.shape)
    assert states.s.shape == (refs.k.shape[1], refs.v.shape[1])
    ops, keys = operations(refs.v.dtype), keys_of(refs)
    written = Written(_value(values_ref), decay_of(keys.gate, keys.marks, ops))
    q = refs.q[0].astype(jnp.float32)
    out, total = read(call.rule, ops, q, keys, written, values(states))
    out_ref[0] = out.astype(out_ref.dtype)
    if total is not None:
        total_ref[0] = jnp.squeeze(total, 1)


def _queries_kernel(
    refs: ChunkInputs, values_ref: Any, states: State, cotangent: ChunkOutputs,
    dq_ref: Any, dvalues_ref: Any, dstate_ref: State, *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes the cotangents of queries, written values and the state at the start.

    ``refs`` are as in the forward kernel, but ``q``, ``out`` and ``total`` have all
    query heads of the group in front: ``q [group, chunk, features]``.
    """
    assert refs.q.shape == dq_ref.shape
    assert dstate_ref.s.shape == states.s.shape
    pull = _pull_reads(refs, values_ref, states, call)

    def of(g: Any) -> tuple[Any, State]:
        # The unused cotangents are dead code, which the compiler removes.
        dq, _, du, ds = pull(refs.q[g].astype(jnp.float32), _member(cotangent, g))
        dq_ref[g] = dq.astype(dq_ref.dtype)
        return du, ds

    du, ds = _summed(of, refs.q.shape[0])
    dvalues_ref[...] = du
    for ref, value in zip(dstate_ref, ds, strict=True):
        if ref is not None:
            ref[...] = value


def _keys_kernel(
    refs: ChunkInputs, values_ref: Any, states: State, cotangent: ChunkOutputs,
    dvalues_ref: Any, dends: State, outs: ChunkInputs, *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes the cotangents of keys; ``outs`` are shaped like ``refs``.

    They come from the reads within the chunk, from the state at its end, whose
    cotangent is ``dends``, and from the written values. ``refs`` are as in
    ``_queries_kernel``.
    """
    assert refs.k.shape == outs.k.shape
    assert dvalues_ref.shape == values_ref.shape
    ops, pull = (
        launch.differentiated(refs.v.dtype),
        _pull_reads(refs, values_ref, states, call),
    )
    parts, joined = _parts(keys_of(refs))
    written, state = _value(values_ref), values(states)

    def of(g: Any) -> tuple:
        return pull(refs.q[g].astype(jnp.float32), _member(cotangent, g))[1]

    def ahead(parts: tuple, written: Any, state: State) -> State:
        keys = joined(parts)
        decay = decay_of(keys.gate, keys.marks, ops)
        return advance(ops, keys, Written(written, decay), state)

    def writes(parts: tuple, state: State) -> Any:
        return write(call.rule, ops, joined(parts), state).values

    found = _summed(of, refs.q.shape[0])
    _, pull_ahead = jax.vjp(ahead, parts, written, state)
    found = _added(found, pull_ahead(values(dends))[0])
    if refs.erase is not None:
        _, pull_writes = jax.vjp(writes, parts, state)
        found = _added(found, pull_writes(dvalues_ref[...])[0])
    *arrays, fine = found
    for ref, value in zip(outs[1:5], arrays, strict=True):
        if ref is not None:
            ref[...] = value.astype(ref.dtype)
    if fine is not None:
        outs.marks.fine[...] = jnp.sum(fine.col, 1) + jnp.sum(fine.row, 0)


def _parts(keys: ChunkKeys) -> tuple[tuple, Callable[[tuple], ChunkKeys]]:
    """What has a cotangent: ``k, v, erase, gate`` and the fine marks."""

    def joined(parts: tuple) -> ChunkKeys:
        k, v, erase, gate, fine = parts
        return ChunkKeys(k, v, erase, gate, keys.marks._replace(fine=fine))

    return (*keys[:4], keys.marks.fine), joined


def _added(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _pull_reads(
    refs: ChunkInputs, values_ref: Any, states: State, call: LinearCall
) -> Callable[[Any, tuple[Any, Any]], tuple]:
    """The derivative of a chunk's reads as a function of queries and cotangents.

    It returns the cotangents of the queries, of ``_parts``, of the written values and
    of the state at the start.
    """
    assert values_ref.shape == refs.v.shape
    assert states.s.shape == (refs.k.shape[1], refs.v.shape[1])
    ops = launch.differentiated(refs.v.dtype)
    parts, joined = _parts(keys_of(refs))

    def reads(q: Any, parts: tuple, written: Any, state: State) -> tuple[Any, Any]:
        keys = joined(parts)
        decay = decay_of(keys.gate, keys.marks, ops)
        return read(call.rule, ops, q, keys, Written(written, decay), state)

    def pull(q: Any, cotangents: tuple[Any, Any]) -> tuple:
        arrays = q, parts, _value(values_ref), values(states)
        return jax.vjp(reads, *arrays)[1](cotangents)

    return pull


def _value(ref: Any) -> Any:
    return ref[...].astype(jnp.float32)


def _summed(of: Callable[[Any], Any], members: int) -> Any:
    """The sum of ``of(g)`` over the query heads ``g`` of a group."""

    def add(g: Any, total: Any) -> Any:
        return _added(total, of(g))

    # A loop keeps its sum in registers; a single member needs no loop.
    first = of(0)
    return (
        first
        if members == 1
        else repeat(members - 1, lambda g, total: add(g + 1, total), first)
    )


def _member(cotangent: ChunkOutputs, g: Any) -> tuple[Any, Any]:
    """The cotangents of the output and the normaliser of query head ``g``."""
    total = None if cotangent.total is None else cotangent.total[g][:, None]
    return cotangent.out[g].astype(jnp.float32), total
