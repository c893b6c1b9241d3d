"""Linear attention on TPUs: a loop over chunks, with the state in VMEM.

It is the chunkwise form in which states are not stored (Yang et al., Gated Linear
Attention, 2024, section 3). The backward pass first computes the state at the start of
every chunk. It then goes from the last chunk to the first, with the cotangent of the
state in VMEM.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import algebra, gradient
from pallas_kernels.linear.algebra import ChunkKeys, Marks, Pair, State
from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.tpu.launch import block_index
from pallas_kernels.tpu.operands import to_column, to_row
from pallas_kernels.tpu.runs import LANES
from pallas_kernels.varying import shape_like

# The grid is (head, chunk, member of the group).
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries."""
    chunks, dtype = _ready(chunks, call)
    heads, group, padded, _ = chunks.q.shape
    grid = heads, padded // call.chunk, group
    out = shape_like((*chunks.q.shape[:3], chunks.v.shape[-1]), dtype, chunks.q)
    total = _total_shape(chunks, call)
    out, total = pl.pallas_call(
        partial(_forward_kernel, call=call, group=group),
        grid=grid,
        in_specs=[_chunk_specs(chunks, call)],
        out_specs=[_row_spec(out, call), _total_spec(call)],
        out_shape=[out, total],
        scratch_shapes=[_state_scratch(chunks, call)],
        compiler_params=ORDER,
        interpret=call.interpret,
        name="sadsl_linear_forward",
    )(chunks)
    return ChunkOutputs(out, None if total is None else total.reshape(*out.shape[:3]))


def backward(chunks: ChunkInputs, cotangent: ChunkOutputs, call: LinearCall) -> tuple:
    """The cotangents of q, k, v and the fine marks (None where there are none)."""
    dtypes = [x.dtype for x in chunks[:3]]
    chunks, _ = _ready(chunks, call)
    states = _states(chunks, call)
    heads, group, padded, features = chunks.q.shape
    steps, head_dim_v = padded // call.chunk, chunks.v.shape[-1]
    last = lambda c: steps - 1 - c
    dout, dtotal = cotangent
    dout = dout.astype(chunks.v.dtype)
    if dtotal is not None:
        dtotal = dtotal.reshape(heads, group, steps, 1, call.chunk)

    arrays = zip(chunks[:3], dtypes, strict=True)
    shapes = [shape_like(x.shape, t, chunks.q) for x, t in arrays]
    fine = chunks.marks.fine
    dfine = None if fine is None else shape_like(fine.shape, jnp.float32, fine)
    accumulators = (
        pltpu.VMEM((call.chunk, features), jnp.float32),
        pltpu.VMEM((call.chunk, head_dim_v), jnp.float32),
        None if fine is None else pltpu.VMEM((1, call.chunk), jnp.float32),
    )
    specs = _chunk_specs(chunks, call, last)
    of_totals = None if dtotal is None else _total_spec(call, last)
    (found,) = pl.pallas_call(
        partial(_backward_kernel, call=call, group=group),
        grid=(heads, steps, group),
        in_specs=[
            specs,
            _state_specs(states, last),
            ChunkOutputs(_row_spec(dout, call, last), of_totals),
        ],
        out_specs=[(specs.q, specs.k, specs.v, specs.marks.fine)],
        out_shape=[(*shapes, dfine)],
        scratch_shapes=[_state_scratch(chunks, call), accumulators],
        compiler_params=ORDER,
        interpret=call.interpret,
        name="sadsl_linear_backward",
    )(chunks, states, ChunkOutputs(dout, dtotal))
    dq, dk, dv, dfine = found
    return dq, dk, dv, None if dfine is None else dfine[:, :, 0]


def _states(chunks: ChunkInputs, call: LinearCall) -> State:
    """The state at the start of every chunk, ``[heads, chunks, ...]``."""
    heads, _, padded, features = chunks.q.shape
    lead = heads, padded // call.chunk
    shape = State(
        shape_like((*lead, features, chunks.v.shape[-1]), jnp.float32, chunks.k),
        shape_like((*lead, 1, features), jnp.float32, chunks.k),
    )
    shape = _fitting(shape, call)
    specs = _chunk_specs(chunks, call)
    (states,) = pl.pallas_call(
        partial(_states_kernel, call=call),
        grid=(*lead, 1),
        in_specs=[specs.k, specs.v, specs.marks],
        out_specs=[_state_specs(shape, lambda c: c)],
        out_shape=[shape],
        scratch_shapes=[_state_scratch(chunks, call)],
        compiler_params=ORDER,
        interpret=call.interpret,
        name="sadsl_linear_states",
    )(chunks.k, chunks.v, chunks.marks)
    return states


# --- kernels ---


def _forward_kernel(
    refs: ChunkInputs, out_ref: Any, total_ref: Any, state_ref: State,
    *, call: LinearCall, group: int,
) -> None:  # fmt: skip
    """Computes ``out [chunk, head_dim_v]`` and ``total [1, chunk]`` of one query head.

    ``refs`` are ``q [chunk, features]``, ``k`` like it, ``v [chunk, head_dim_v]`` and
    marks ``[1, chunk]``. The scratch ``state_ref`` is f32 ``[features, head_dim_v]``
    and ``[1, features]``.
    """
    assert refs.q.shape == refs.k.shape == (call.chunk, state_ref.s.shape[0])
    assert refs.v.shape == out_ref.shape == (call.chunk, state_ref.s.shape[1])
    _zero_at_first(state_ref)
    dot = algebra.plain_dot(refs.v.dtype)
    keys, state = _keys(refs.k, refs.v, refs.marks), _values(state_ref)
    q = refs.q[...].astype(jnp.float32)
    out, total = algebra.read(call.rule, dot, q, keys, state)
    out_ref[...] = out.astype(out_ref.dtype)
    if total is not None:
        total_ref[...] = to_row(total)

    @pl.when(pl.program_id(2) == group - 1)
    def _() -> None:
        _store(state_ref, algebra.write(call.rule, dot, keys, state))


def _states_kernel(
    k_ref: Any, v_ref: Any, marks: Marks, out_ref: State, state_ref: State,
    *, call: LinearCall,
) -> None:  # fmt: skip
    """Stores the state at the start of each chunk; shapes as in the forward kernel."""
    assert out_ref.s.shape == state_ref.s.shape == (k_ref.shape[1], v_ref.shape[1])
    _zero_at_first(state_ref)
    dot = algebra.plain_dot(v_ref.dtype)
    state = _values(state_ref)
    _store(out_ref, state)
    keys = _keys(k_ref, v_ref, marks)
    _store(state_ref, algebra.write(call.rule, dot, keys, state))


def _backward_kernel(
    refs: ChunkInputs, states: State, cotangent: ChunkOutputs, outs: tuple,
    dstate_ref: State, sums: tuple, *, call: LinearCall, group: int,
) -> None:  # fmt: skip
    """Computes the cotangents of ``q``, ``k``, ``v`` and ``fine`` of one chunk.

    Shapes are those of the forward kernel: ``outs`` are like ``q, k, v`` and ``fine [1,
    chunk]``. The scratch ``dstate_ref`` is like the state. The scratch ``sums`` holds
    the cotangents of the keys, f32, summed over the query heads of the group.
    """
    assert cotangent.out.shape == refs.v.shape
    assert dstate_ref.s.shape == states.s.shape
    _zero_at_first(dstate_ref)
    dot = algebra.kernel_dot(refs.v.dtype)
    keys, state = _keys(refs.k, refs.v, refs.marks), _values(states)
    member = pl.program_id(2)

    def values(x: gradient.KeyGradients) -> tuple:
        fine = None if x.fine is None else x.fine.row + to_row(x.fine.col)
        return x.k, x.v, fine

    @pl.when(member == 0)
    def _() -> None:
        after = _values(dstate_ref)
        own, before = gradient.of_write(call.rule, dot, keys, state, after)
        _store(sums, values(own))
        _store(dstate_ref, before)

    dout_ref, dtotal_ref = cotangent
    dtotal = None if dtotal_ref is None else to_column(dtotal_ref[...])
    cotangents = dout_ref[...].astype(jnp.float32), dtotal
    q = refs.q[...].astype(jnp.float32)
    found = gradient.of_read(call.rule, dot, q, keys, state, cotangents)
    dq_ref, *of_keys = outs
    dq_ref[...] = found[0].astype(dq_ref.dtype)
    _add(sums, values(found[1]))
    _add(dstate_ref, found[2])

    @pl.when(member == group - 1)
    def _() -> None:
        for ref, total in zip(of_keys, sums, strict=True):
            if ref is not None:
                ref[...] = total[...].astype(ref.dtype)


# --- what kernels see ---


def _ready(chunks: ChunkInputs, call: LinearCall) -> tuple[ChunkInputs, Any]:
    """The arrays in the form that the kernels read, and the dtype of the output.

    Raises:
      ValueError: the chunk is not a multiple of the lanes of a register.
    """
    if call.chunk % LANES and not call.interpret:
        raise ValueError(
            f"a chunk of {call.chunk}: impl='tpu' needs a multiple of {LANES}, such as "
            f"{-(-call.chunk // LANES) * LANES}"
        )
    dtype = chunks.q.dtype
    q, k, v, marks = chunks
    if dtype == jnp.float16:
        # The chip has no f16 arithmetic, and bf16 has three bits less.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    marks = jax.tree.map(lambda x: x[:, :, None], marks)
    return ChunkInputs(q, k, v, marks), dtype


def _same(c: Any) -> Any:
    return c


def _chunk_specs(
    chunks: ChunkInputs, call: LinearCall, at: Callable[[Any], Any] = _same
) -> ChunkInputs:
    """The specs of a chunk: the queries of one member of the group, and the keys."""

    def keys(x: Any) -> pl.BlockSpec:
        shape = None, call.chunk, x.shape[-1]
        return pl.BlockSpec(shape, lambda h, c, g: block_index(h, at(c), 0))

    row = pl.BlockSpec(
        (None, None, 1, call.chunk), lambda h, c, g: block_index(h, at(c), 0, 0)
    )
    marks = jax.tree.map(lambda _: row, chunks.marks)
    return ChunkInputs(
        _row_spec(chunks.q, call, at), keys(chunks.k), keys(chunks.v), marks
    )


def _row_spec(
    x: Any, call: LinearCall, at: Callable[[Any], Any] = _same
) -> pl.BlockSpec:
    shape = None, None, call.chunk, x.shape[-1]
    return pl.BlockSpec(shape, lambda h, c, g: block_index(h, g, at(c), 0))


def _total_shape(chunks: ChunkInputs, call: LinearCall) -> Any:
    heads, group, padded, _ = chunks.q.shape
    shape = heads, group, padded // call.chunk, 1, call.chunk
    return None if call.rule.eps is None else shape_like(shape, jnp.float32, chunks.q)


def _total_spec(
    call: LinearCall, at: Callable[[Any], Any] = _same
) -> pl.BlockSpec | None:
    if call.rule.eps is None:
        return None
    shape = None, None, None, 1, call.chunk
    return pl.BlockSpec(shape, lambda h, c, g: block_index(h, g, at(c), 0, 0))


def _fitting(state: State, call: LinearCall) -> State:
    return state._replace(z=None) if call.rule.eps is None else state


def _state_specs(states: State, at: Callable[[Any], Any]) -> State:
    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda h, c, g: block_index(h, at(c), 0, 0)
        )

    return jax.tree.map(spec, states)


def _state_scratch(chunks: ChunkInputs, call: LinearCall) -> State:
    features, head_dim_v = chunks.k.shape[-1], chunks.v.shape[-1]
    s, z = (features, head_dim_v), (1, features)
    return _fitting(State(pltpu.VMEM(s, jnp.float32), pltpu.VMEM(z, jnp.float32)), call)


def _keys(k_ref: Any, v_ref: Any, marks: Marks) -> ChunkKeys:
    def pair(ref: Any) -> Pair | None:
        return None if ref is None else Pair(to_column(ref[...]), ref[...])

    k, v = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
    return ChunkKeys(k, v, Marks(*map(pair, marks)))


def _values(refs: State) -> State:
    return jax.tree.map(lambda ref: ref[...], refs)


def _store(refs: Any, values: Any) -> None:
    for ref, value in zip(refs, values, strict=True):
        if ref is not None:
            ref[...] = value


def _add(refs: Any, values: Any) -> None:
    for ref, value in zip(refs, values, strict=True):
        if ref is not None:
            ref[...] += value


def _zero_at_first(refs: State) -> None:
    """Sets a state to 0 at the first grid step of a head."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        _store(refs, jax.tree.map(lambda ref: jnp.zeros_like(ref[...]), refs))
