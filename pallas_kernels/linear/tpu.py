"""Linear attention on TPUs: a loop over chunks, with the state in VMEM.

It is the chunkwise form in which states are not stored (Yang et al., Gated Linear
Attention, 2024, section 3). The backward pass first computes the state at the start of
every chunk. It then goes from the last chunk to the first, with the cotangent of the
state in VMEM. The query heads of a group are further rows of a chunk's queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.chunk import ChunkKeys, State, advance, of_chunk, write
from pallas_kernels.linear.inverse import kernel_solve
from pallas_kernels.linear.marks import Marks, Pair
from pallas_kernels.linear.products import Ops, kernel_dot, plain_dot, swapped_halves
from pallas_kernels.tpu.operands import to_column, to_row
from pallas_kernels.tpu.runs import LANES
from pallas_kernels.tpu.walk import block_index
from pallas_kernels.varying import shape_like

SUBLANES = 8
# Rows of queries, chunk times query heads, that a backward grid step has memory for.
MOST_ROWS = 2048
# The grid is (head, chunk).
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def members_of(group: int, chunk: int) -> int:
    """How many query heads of a group share a grid step: a divisor of ``group``."""
    most = max(MOST_ROWS // chunk, 1)
    return max(n for n in range(1, min(group, most) + 1) if group % n == 0)


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries, and the state after all keys."""
    chunks, dtype = _ready(chunks, call)
    heads, group, padded, _ = chunks.q.shape
    steps, head_dim_v = padded // call.chunk, chunks.v.shape[-1]
    out = shape_like((heads, group, padded, head_dim_v), dtype, chunks.q)
    rows = ChunkOutputs(out, _total_shape(chunks, call), _shapes(chunks.state))
    (found,) = pl.pallas_call(
        partial(_forward_kernel, call=call),
        grid=(heads, steps),
        in_specs=[_chunk_specs(chunks, call)],
        out_specs=[_row_specs(rows, call)],
        out_shape=[rows],
        scratch_shapes=[_scratch(chunks.state)],
        compiler_params=ORDER,
        interpret=call.interpret,
        name="sadsl_linear_forward",
    )(chunks)
    total = found.total
    if total is not None:
        total = total.reshape(heads, steps, group, call.chunk)
        total = total.swapaxes(1, 2).reshape(heads, group, padded)
    return found._replace(total=total)


def backward(
    chunks: ChunkInputs, cotangent: ChunkOutputs, call: LinearCall
) -> ChunkInputs:
    """The cotangents of all arrays, of ``marks`` only those of ``fine``."""
    dtypes = jax.tree.map(lambda x: x.dtype, chunks._replace(marks=Marks()))
    chunks, _ = _ready(chunks, call)
    states = _states(chunks, call)
    heads, group, padded, _ = chunks.q.shape
    steps = padded // call.chunk
    last = lambda c: steps - 1 - c
    total = cotangent.total
    if total is not None:
        total = total.reshape(heads, group, steps, call.chunk).swapaxes(1, 2)
        total = total.reshape(heads, steps, 1, group * call.chunk)
    cotangent = ChunkOutputs(
        cotangent.out.astype(chunks.v.dtype), total, cotangent.state
    )
    fine = chunks.marks.fine
    kept = chunks._replace(marks=Marks())
    shapes = jax.tree.map(
        lambda x, t: shape_like(x.shape, t, chunks.q), kept, dtypes
    )._replace(marks=Marks(None if fine is None else _shapes(fine)))
    specs = _chunk_specs(chunks, call, last)
    (found,) = pl.pallas_call(
        partial(_backward_kernel, call=call),
        grid=(heads, steps),
        in_specs=[
            specs,
            _state_specs(states, last),
            _row_specs(cotangent, call, last),
        ],
        out_specs=[specs._replace(marks=Marks(specs.marks.fine))],
        out_shape=[shapes],
        scratch_shapes=[_scratch(chunks.state)],
        compiler_params=ORDER,
        interpret=call.interpret,
        name="sadsl_linear_backward",
    )(chunks, states, cotangent)
    fine = found.marks.fine
    return found._replace(marks=Marks(None if fine is None else fine[:, :, 0]))


def _states(chunks: ChunkInputs, call: LinearCall) -> State:
    """The state at the start of every chunk, ``[heads, chunks, ...]``."""
    heads, _, padded, _ = chunks.q.shape
    steps = padded // call.chunk
    keys = chunks._replace(q=None)
    shape = jax.tree.map(
        lambda x: shape_like((heads, steps, *x.shape[1:]), jnp.float32, chunks.k),
        chunks.state,
    )
    (states,) = pl.pallas_call(
        partial(_states_kernel, call=call),
        grid=(heads, steps),
        in_specs=[_chunk_specs(keys, call)],
        out_specs=[_state_specs(shape, _same)],
        out_shape=[shape],
        scratch_shapes=[_scratch(chunks.state)],
        compiler_params=ORDER,
        interpret=call.interpret,
        name="sadsl_linear_states",
    )(keys)
    return states


# --- kernels ---


def _forward_kernel(
    refs: ChunkInputs, outs: ChunkOutputs, state_ref: State, *, call: LinearCall
) -> None:
    """Computes ``out [group, chunk, head_dim_v]`` and ``total [1, group * chunk]``.

    ``refs`` are ``q [group, chunk, features]``, ``k``, ``erase`` and ``gate [chunk,
    features]``, ``v [chunk, head_dim_v]``, marks ``[1, chunk]``, and the state before
    the first key, f32 ``[features, head_dim_v]`` and ``[1, features]``. The scratch
    ``state_ref`` is like it; so is the state after the last key, in ``outs``.
    """
    assert refs.q.shape[1:] == refs.k.shape == (call.chunk, state_ref.s.shape[0])
    assert refs.v.shape == outs.out.shape[1:] == (call.chunk, state_ref.s.shape[1])
    _at_first(state_ref, refs.state)
    state, q = _values(state_ref), refs.q[...].astype(jnp.float32)
    out, total, state = of_chunk(
        call.rule, _ops(refs.v.dtype), _flat(q), _keys(refs), state
    )
    outs.out[...] = out.reshape(outs.out.shape).astype(outs.out.dtype)
    if total is not None:
        outs.total[...] = to_row(total)
    _store(state_ref, state)
    _at_last(outs.state, state)


def _states_kernel(
    refs: ChunkInputs, out_ref: State, state_ref: State, *, call: LinearCall
) -> None:
    """Stores the state at the start of each chunk; shapes as in the forward kernel."""
    assert out_ref.s.shape == state_ref.s.shape == refs.state.s.shape
    _at_first(state_ref, refs.state)
    ops, keys, state = _ops(refs.v.dtype), _keys(refs), _values(state_ref)
    _store(out_ref, state)
    written = write(call.rule, ops, keys, state)
    _store(state_ref, advance(ops, keys, written, state))


def _backward_kernel(
    refs: ChunkInputs, states: State, cotangent: ChunkOutputs, outs: ChunkInputs,
    dstate_ref: State, *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes the cotangents of one chunk's arrays; ``outs`` are shaped like ``refs``.

    Shapes are those of the forward kernel. The scratch ``dstate_ref`` holds the
    cotangent of the state at the end of the chunk, and then of that at its start.
    """
    assert cotangent.out.shape[1:] == refs.v.shape
    assert dstate_ref.s.shape == states.s.shape
    _at_first(dstate_ref, cotangent.state)
    keys, ops = _keys(refs), _ops(refs.v.dtype)

    def f(q: Any, keys: ChunkKeys, fine: Any, state: State) -> Any:
        marks = keys.marks._replace(fine=fine, coarse=coarse, run=run)
        return of_chunk(call.rule, ops, q, keys._replace(marks=marks), state)

    fine, coarse, run = keys.marks
    apart = keys._replace(marks=Marks())
    q = _flat(refs.q[...].astype(jnp.float32))
    _, pull = jax.vjp(f, q, apart, fine, _values(states))
    dout = _flat(cotangent.out[...].astype(jnp.float32))
    dtotal = None if cotangent.total is None else to_column(cotangent.total[...])
    dq, dkeys, dfine, dstate = pull((dout, dtotal, _values(dstate_ref)))
    outs.q[...] = dq.reshape(outs.q.shape).astype(outs.q.dtype)
    _store(outs[1:5], dkeys[:4])
    if dfine is not None:
        outs.marks.fine[...] = dfine.row + to_row(dfine.col)
    _store(dstate_ref, dstate)
    _at_last(outs.state, dstate)


def _ops(dtype: Any) -> Ops:
    solve = partial(kernel_solve, plain_dot(dtype))
    return Ops(kernel_dot(dtype), solve, _swapped, to_column)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swapped(x: jax.Array, b: int) -> jax.Array:
    """``products.swapped_halves``; below 8 rows by rotations of the sublanes."""
    if b >= SUBLANES:
        return swapped_halves(x, b)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    up, down = pltpu.roll(x, b, 0), pltpu.roll(x, x.shape[0] - b, 0)
    return jnp.where((row & b) != 0, up, down)


# The exchange is its own transpose.
_swapped.defvjp(lambda x, b: (_swapped(x, b), None), lambda b, _, g: (_swapped(g, b),))


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
    if dtype == jnp.float16:
        # The chip has no f16 arithmetic, and bf16 has three bits less.
        chunks = jax.tree.map(lambda x: x.astype(jnp.float32), chunks)
    return chunks._replace(
        marks=jax.tree.map(lambda x: x[:, :, None], chunks.marks)
    ), dtype


def _same(c: Any) -> Any:
    return c


def _chunk_specs(
    chunks: ChunkInputs, call: LinearCall, at: Callable[[Any], Any] = _same
) -> ChunkInputs:
    """The specs of a chunk: the queries of the whole group, the keys, the state."""

    def keys(x: Any) -> pl.BlockSpec:
        shape = None, call.chunk, x.shape[-1]
        return pl.BlockSpec(shape, lambda h, c: block_index(h, at(c), 0))

    row = pl.BlockSpec(
        (None, None, 1, call.chunk), lambda h, c: block_index(h, at(c), 0, 0)
    )
    of_keys = jax.tree.map(keys, chunks._replace(q=None, marks=Marks(), state=None))
    return of_keys._replace(
        q=None if chunks.q is None else _queries_spec(chunks.q, call, at),
        marks=jax.tree.map(lambda _: row, chunks.marks),
        state=_whole(chunks.state),
    )


def _queries_spec(x: Any, call: LinearCall, at: Callable[[Any], Any]) -> pl.BlockSpec:
    shape = None, x.shape[1], call.chunk, x.shape[-1]
    return pl.BlockSpec(shape, lambda h, c: block_index(h, 0, at(c), 0))


def _row_specs(
    rows: ChunkOutputs, call: LinearCall, at: Callable[[Any], Any] = _same
) -> ChunkOutputs:
    total = None
    if rows.total is not None:
        total = pl.BlockSpec(
            (None, None, 1, rows.total.shape[-1]),
            lambda h, c: block_index(h, at(c), 0, 0),
        )
    return ChunkOutputs(_queries_spec(rows.out, call, at), total, _whole(rows.state))


def _total_shape(chunks: ChunkInputs, call: LinearCall) -> Any:
    heads, group, padded, _ = chunks.q.shape
    shape = heads, padded // call.chunk, 1, group * call.chunk
    return None if call.rule.eps is None else shape_like(shape, jnp.float32, chunks.q)


def _whole(state: State) -> State:
    """The specs of a state of each head, the same at all chunks."""

    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda h, c: block_index(h, 0, 0))

    return jax.tree.map(spec, state)


def _state_specs(states: State, at: Callable[[Any], Any]) -> State:
    """The specs of states ``[heads, chunks, ...]``."""

    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda h, c: block_index(h, at(c), 0, 0)
        )

    return jax.tree.map(spec, states)


def _scratch(state: State) -> State:
    return jax.tree.map(lambda x: pltpu.VMEM(x.shape[1:], jnp.float32), state)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: shape_like(x.shape, x.dtype, x), tree)


def _flat(x: jax.Array) -> jax.Array:
    """``[group, chunk, n]`` as ``[group * chunk, n]``."""
    return x.reshape(-1, x.shape[-1])


def _keys(refs: ChunkInputs) -> ChunkKeys:
    def pair(ref: Any) -> Pair | None:
        return None if ref is None else Pair(to_column(ref[...]), ref[...])

    def value(ref: Any) -> Any:
        return None if ref is None else ref[...].astype(jnp.float32)

    k, v, erase, gate = map(value, refs[1:5])
    return ChunkKeys(k, v, erase, gate, Marks(*map(pair, refs.marks)))


def _values(refs: State) -> State:
    return jax.tree.map(lambda ref: ref[...], refs)


def _store(refs: Any, values: Any) -> None:
    for ref, value in zip(refs, values, strict=True):
        if ref is not None:
            ref[...] = value.astype(ref.dtype)


def _at_first(refs: State, start: State) -> None:
    """Sets a state to ``start`` at the first grid step of a head."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        _store(refs, _values(start))


def _at_last(refs: State, values: State) -> None:
    """Stores a state at the last grid step of a head."""

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        _store(refs, values)
