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
# Rows of queries, step times query heads, that a backward grid step has memory for.
MOST_ROWS = 2048
# The grid is (head, step).
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def members_of(group: int, step: int) -> int:
    """How many query heads of a group share a grid step: a divisor of ``group``."""
    most = max(MOST_ROWS // step, 1)
    return max(n for n in range(1, min(group, most) + 1) if group % n == 0)


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries, and the state after all keys."""
    chunks, dtype = _ready(chunks, call)
    heads, group, padded, _ = chunks.q.shape
    steps, head_dim_v = padded // call.step, chunks.v.shape[-1]
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
        total = total.reshape(heads, -1, group, call.chunk)
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
    steps = padded // call.step
    last = lambda c: steps - 1 - c
    total = cotangent.total
    if total is not None:
        total = total.reshape(heads, group, -1, call.chunk).swapaxes(1, 2)
        total = total.reshape(heads, steps, call.span, group * call.chunk)
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
    return found._replace(
        marks=Marks(None if fine is None else fine.reshape(heads, -1, call.chunk))
    )


def _states(chunks: ChunkInputs, call: LinearCall) -> State:
    """The state at the start of every step, ``[heads, steps, ...]``."""
    heads, _, padded, _ = chunks.q.shape
    steps = padded // call.step
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
    """Computes ``out [group, step, head_dim_v]``, ``total [span, group * chunk]``.

    ``refs`` are ``q [group, step, features]``, ``k``, ``erase`` and ``gate [step,
    features]``, ``v [step, head_dim_v]``, marks ``[span, chunk]``, and the state before
    the first key, f32 ``[features, head_dim_v]`` and ``[1, features]``. The scratch
    ``state_ref`` is like it; so is the state after the last key, in ``outs``.
    """
    assert refs.q.shape[1:] == refs.k.shape == (call.step, state_ref.s.shape[0])
    assert refs.v.shape == outs.out.shape[1:] == (call.step, state_ref.s.shape[1])
    _at_first(state_ref, refs.state)
    state, ops = _values(state_ref), _ops(refs.v.dtype)
    for at in range(call.span):
        q, keys = _queries(refs.q, at, call), _keys(refs, at, call)
        out, total, state = of_chunk(call.rule, ops, q, keys, state)
        _store_queries(outs.out, out, at, call)
        if total is not None:
            outs.total[at : at + 1] = to_row(total)
    _store(state_ref, state)
    _at_last(outs.state, state)


def _states_kernel(
    refs: ChunkInputs, out_ref: State, state_ref: State, *, call: LinearCall
) -> None:
    """Stores the state at the start of each step; shapes as in the forward kernel."""
    assert out_ref.s.shape == state_ref.s.shape == refs.state.s.shape
    _at_first(state_ref, refs.state)
    ops, state = _ops(refs.v.dtype), _values(state_ref)
    _store(out_ref, state)
    for at in range(call.span):
        keys = _keys(refs, at, call)
        state = advance(ops, keys, write(call.rule, ops, keys, state), state)
    _store(state_ref, state)


def _backward_kernel(
    refs: ChunkInputs, states: State, cotangent: ChunkOutputs, outs: ChunkInputs,
    dstate_ref: State, *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes the cotangents of a step's arrays; ``outs`` are shaped like ``refs``.

    Shapes are those of the forward kernel. The scratch ``dstate_ref`` holds the
    cotangent of the state at the end of the step, and then of that at its start.
    """
    assert cotangent.out.shape[1:] == refs.v.shape
    assert dstate_ref.s.shape == states.s.shape
    _at_first(dstate_ref, cotangent.state)
    ops, places = _ops(refs.v.dtype), range(call.span)
    all_keys = [_keys(refs, at, call) for at in places]

    def f(parts: list, state: State) -> tuple[list, State]:
        rows = []
        for (q, keys, fine), fixed in zip(parts, all_keys, strict=True):
            keys = keys._replace(marks=fixed.marks._replace(fine=fine))
            out, total, state = of_chunk(call.rule, ops, q, keys, state)
            rows.append((out, total))
        return rows, state

    parts = [
        (_queries(refs.q, at, call), keys._replace(marks=Marks()), keys.marks.fine)
        for at, keys in enumerate(all_keys)
    ]
    _, pull = jax.vjp(f, parts, _values(states))
    drows = [_row_cotangents(cotangent, at, call) for at in places]
    dparts, dstate = pull((drows, _values(dstate_ref)))
    for at, (dq, dkeys, dfine) in enumerate(dparts):
        _store_queries(outs.q, dq, at, call)
        for ref, value in zip(outs[1:5], dkeys[:4], strict=True):
            if ref is not None:
                ref[_rows(at, call)] = value.astype(ref.dtype)
        if dfine is not None:
            outs.marks.fine[at : at + 1] = dfine.row + to_row(dfine.col)
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
    shape = chunks.q.shape[0], -1, call.span, call.chunk
    marks = jax.tree.map(lambda x: x.reshape(shape), chunks.marks)
    return chunks._replace(marks=marks), dtype


def _same(c: Any) -> Any:
    return c


def _chunk_specs(
    chunks: ChunkInputs, call: LinearCall, at: Callable[[Any], Any] = _same
) -> ChunkInputs:
    """The specs of a step: the queries of the whole group, the keys, the state."""

    def keys(x: Any) -> pl.BlockSpec:
        shape = None, call.step, x.shape[-1]
        return pl.BlockSpec(shape, lambda h, c: block_index(h, at(c), 0))

    row = pl.BlockSpec(
        (None, None, call.span, call.chunk), lambda h, c: block_index(h, at(c), 0, 0)
    )
    of_keys = jax.tree.map(keys, chunks._replace(q=None, marks=Marks(), state=None))
    return of_keys._replace(
        q=None if chunks.q is None else _queries_spec(chunks.q, call, at),
        marks=jax.tree.map(lambda _: row, chunks.marks),
        state=_whole(chunks.state),
    )


def _queries_spec(x: Any, call: LinearCall, at: Callable[[Any], Any]) -> pl.BlockSpec:
    shape = None, x.shape[1], call.step, x.shape[-1]
    return pl.BlockSpec(shape, lambda h, c: block_index(h, 0, at(c), 0))


def _row_specs(
    rows: ChunkOutputs, call: LinearCall, at: Callable[[Any], Any] = _same
) -> ChunkOutputs:
    total = None
    if rows.total is not None:
        total = pl.BlockSpec(
            (None, None, *rows.total.shape[2:]),
            lambda h, c: block_index(h, at(c), 0, 0),
        )
    return ChunkOutputs(_queries_spec(rows.out, call, at), total, _whole(rows.state))


def _total_shape(chunks: ChunkInputs, call: LinearCall) -> Any:
    heads, group, padded, _ = chunks.q.shape
    shape = heads, padded // call.step, call.span, group * call.chunk
    return None if call.rule.eps is None else shape_like(shape, jnp.float32, chunks.q)


def _whole(state: State) -> State:
    """The specs of a state of each head, the same at all chunks."""

    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda h, c: block_index(h, 0, 0))

    return jax.tree.map(spec, state)


def _state_specs(states: State, at: Callable[[Any], Any]) -> State:
    """The specs of states ``[heads, steps, ...]``."""

    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda h, c: block_index(h, at(c), 0, 0)
        )

    return jax.tree.map(spec, states)


def _scratch(state: State) -> State:
    return jax.tree.map(lambda x: pltpu.VMEM(x.shape[1:], jnp.float32), state)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: shape_like(x.shape, x.dtype, x), tree)


def _rows(at: int, call: LinearCall) -> slice:
    """The positions in a step of the chunk number ``at``."""
    return slice(at * call.chunk, (at + 1) * call.chunk)


def _queries(ref: Any, at: int, call: LinearCall) -> jax.Array:
    """Rows ``[group * chunk, n]`` of a chunk, from ``[group, step, n]``."""
    rows = ref[:, _rows(at, call)].astype(jnp.float32)
    return rows.reshape(-1, ref.shape[2])


def _store_queries(ref: Any, rows: jax.Array, at: int, call: LinearCall) -> None:
    rows = rows.reshape(ref.shape[0], call.chunk, ref.shape[2])
    ref[:, _rows(at, call)] = rows.astype(ref.dtype)


def _row_cotangents(
    refs: ChunkOutputs, at: int, call: LinearCall
) -> tuple[jax.Array, jax.Array | None]:
    total = None if refs.total is None else to_column(refs.total[at : at + 1])
    return _queries(refs.out, at, call), total


def _keys(refs: ChunkInputs, at: int, call: LinearCall) -> ChunkKeys:
    def pair(ref: Any) -> Pair | None:
        row = None if ref is None else ref[at : at + 1]
        return None if row is None else Pair(to_column(row), row)

    def value(ref: Any) -> Any:
        return None if ref is None else ref[_rows(at, call)].astype(jnp.float32)

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
