"""Linear attention on NVIDIA GPUs: all chunks in parallel, with stored states.

It is the chunkwise form in which states are stored (Yang et al., Gated Linear
Attention, 2024, section 3), with an associative scan over chunks:

- Forward: XLA computes the update of each chunk by batched products, and the state at
  the start of each chunk by a scan. Then a kernel has one program per chunk and head.
- Backward: a kernel for the queries also computes the cotangents of the states. A scan
  sums them from the last chunk to the first. A second kernel computes the cotangents of
  keys and values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import algebra, gradient, marks
from pallas_kernels.linear.algebra import ChunkKeys, Marks, Pair, State
from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.xla import by_chunk, empty, keys_of
from pallas_kernels.loops import repeat
from pallas_kernels.triton.launch import pad
from pallas_kernels.triton.tiles import SMALLEST, power_of_two
from pallas_kernels.varying import shape_like


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries."""
    head_dim_v, dtype = chunks.v.shape[-1], chunks.q.dtype
    chunks = _ready(chunks, call)
    states = _before(*_updates(chunks, call))
    heads, group, padded, _ = chunks.q.shape
    row = heads, group, padded
    out = shape_like((*row, chunks.v.shape[-1]), dtype, chunks.q)
    total = None
    if call.rule.eps is not None:
        total = shape_like(row, jnp.float32, chunks.q)
    rows = ChunkOutputs(out, total)
    out, total = pl.pallas_call(
        partial(_forward_kernel, call=call),
        grid=(padded // call.chunk, heads, group),
        in_specs=[_chunk_specs(chunks, call, 1), _state_specs(states)],
        out_specs=list(_row_specs(rows, call, 1)),
        out_shape=[out, total],
        compiler_params=_options(call),
        interpret=call.interpret,
        name="sadsl_linear_forward",
    )(chunks, states)
    return ChunkOutputs(out[..., :head_dim_v], total)


def backward(chunks: ChunkInputs, cotangent: ChunkOutputs, call: LinearCall) -> tuple:
    """The cotangents of q, k, v and the fine marks (None where there are none)."""
    shapes, dtypes = [x.shape for x in chunks[:3]], [x.dtype for x in chunks[:3]]
    chunks = _ready(chunks, call)
    updates, carry = _updates(chunks, call)
    states = _before(updates, carry)
    heads, group, padded, _ = chunks.q.shape
    dout = pad(cotangent.out.astype(chunks.v.dtype), 3, chunks.v.shape[-1])
    cotangent = ChunkOutputs(dout, cotangent.total)
    inputs = chunks, states, cotangent
    spec, state_spec = _chunk_specs(chunks, call, group), _state_specs(states)
    specs = [spec, state_spec, _row_specs(cotangent, call, group)]
    launch = partial(
        pl.pallas_call,
        grid=(padded // call.chunk, heads, 1),
        compiler_params=_options(call),
        interpret=call.interpret,
    )

    def struct(x: jax.Array, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return shape_like(x.shape, dtype, x)

    dq, read = launch(
        partial(_queries_kernel, call=call),
        in_specs=specs,
        out_specs=[spec.q, state_spec],
        out_shape=[struct(chunks.q, dtypes[0]), jax.tree.map(struct, states)],
        name="sadsl_linear_backward_q",
    )(*inputs)
    dstates = _before(read, carry, reverse=True)
    fine = chunks.marks.fine
    dk, dv, dfine = launch(
        partial(_keys_kernel, call=call),
        in_specs=[*specs, state_spec],
        out_specs=[spec.k, spec.v, spec.marks.fine],
        out_shape=[
            struct(chunks.k, dtypes[1]),
            struct(chunks.v, dtypes[2]),
            None if fine is None else struct(fine),
        ],
        name="sadsl_linear_backward_kv",
    )(*inputs, dstates)
    cut = [x[..., : s[-1]] for x, s in zip((dq, dk, dv), shapes, strict=True)]
    return *cut, dfine


# --- states, in plain JAX ---


def _updates(chunks: ChunkInputs, call: LinearCall) -> tuple[State, Pair | None]:
    """The update by each chunk and the factor of the state, ``[heads, chunks, ..]``."""
    rule, dot = call.rule, algebra.plain_dot(chunks.v.dtype)
    heads, _, features = chunks.k.shape
    start = empty(rule, heads, features, chunks.v.shape[-1], jnp.float32)
    start = jax.tree.map(lambda x: x[0], start)

    def of_chunk(keys: ChunkKeys) -> tuple[State, Pair | None]:
        return algebra.write(rule, dot, keys, start), rule.carry(keys.marks)

    # The axes in front are chunks and heads.
    keys = keys_of(by_chunk(chunks, call.chunk))
    found = jax.vmap(jax.vmap(of_chunk))(keys)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def _before(states: State, carry: Pair | None, *, reverse: bool = False) -> State:
    """The state at the start of every chunk, from the updates and factors of chunks.

    With ``reverse``: the cotangent of the state at the end of every chunk, from the
    cotangents of the state at the start that each chunk itself causes.
    """

    def shifted(x: jax.Array) -> jax.Array:
        nothing = jnp.zeros_like(x[:, :1])
        parts = (x[:, 1:], nothing) if reverse else (nothing, x[:, :-1])
        return jnp.concatenate(parts, axis=1)

    if carry is None:
        sums = jax.tree.map(partial(jax.lax.cumsum, axis=1, reverse=reverse), states)
        return jax.tree.map(shifted, sums)

    def scan(factor: jax.Array, x: jax.Array) -> jax.Array:
        def combine(a: tuple, b: tuple) -> tuple:
            return a[0] * b[0], algebra.carried(b[0], a[1]) + b[1]

        pair = factor, x
        return jax.lax.associative_scan(combine, pair, axis=1, reverse=reverse)[1]

    s = shifted(scan(carry.col, states.s))
    z = None if states.z is None else shifted(scan(carry.row, states.z))
    return State(s, z)


# --- kernels ---


def _forward_kernel(
    refs: ChunkInputs, states: State, out_ref: Any, total_ref: Any, *, call: LinearCall
) -> None:
    """Computes ``out [1, chunk, head_dim_v]`` and ``total [1, chunk]`` of a query head.

    ``refs`` are ``q [1, chunk, features]``, ``k [chunk, features]``, ``v [chunk,
    head_dim_v]`` and marks ``[chunk]``; the state at the start is f32 ``[features,
    head_dim_v]`` and ``[1, features]``.
    """
    assert refs.q.shape == (1, *refs.k.shape)
    assert out_ref.shape == (1, *refs.v.shape)
    assert states.s.shape == (refs.k.shape[1], refs.v.shape[1])
    dot = algebra.plain_dot(refs.v.dtype)
    q = refs.q[0].astype(jnp.float32)
    out, total = algebra.read(call.rule, dot, q, _keys(refs), _values(states))
    out_ref[0] = out.astype(out_ref.dtype)
    if total is not None:
        total_ref[0] = jnp.squeeze(total, 1)


def _queries_kernel(
    refs: ChunkInputs, states: State, cotangent: ChunkOutputs, dq_ref: Any,
    dstate_ref: State, *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes the cotangents of the queries and of the state at the chunk's start.

    ``refs`` are as in the forward kernel, but ``q``, ``out`` and ``total`` have all
    query heads of the group in front: ``q [group, chunk, features]``.
    """
    assert refs.q.shape == dq_ref.shape
    assert dstate_ref.s.shape == states.s.shape
    dot = algebra.kernel_dot(refs.v.dtype)
    keys, state = _keys(refs), _values(states)

    def of(g: Any) -> State:
        # The unused cotangents are dead code, which the compiler removes.
        q = refs.q[g].astype(jnp.float32)
        dq, _, own = gradient.of_read(
            call.rule, dot, q, keys, state, _member(cotangent, g)
        )
        dq_ref[g] = dq.astype(dq_ref.dtype)
        return own

    for ref, value in zip(dstate_ref, _summed(of, refs.q.shape[0]), strict=True):
        if ref is not None:
            ref[...] = value


def _keys_kernel(
    refs: ChunkInputs, states: State, cotangent: ChunkOutputs, dstates: State,
    dk_ref: Any, dv_ref: Any, dfine_ref: Any, *, call: LinearCall,
) -> None:  # fmt: skip
    """Computes the cotangents of ``k [chunk, features]``, ``v`` and ``fine [chunk]``.

    They come from the reads within the chunk, and from the state at its end, whose
    cotangent is ``dstates``. ``refs`` are as in ``_queries_kernel``.
    """
    assert refs.k.shape == dk_ref.shape
    assert refs.v.shape == dv_ref.shape
    dot = algebra.kernel_dot(refs.v.dtype)
    keys, state = _keys(refs), _values(states)

    def of(g: Any) -> gradient.KeyGradients:
        q = refs.q[g].astype(jnp.float32)
        return gradient.of_read(call.rule, dot, q, keys, state, _member(cotangent, g))[
            1
        ]

    found = _summed(of, refs.q.shape[0])
    own, _ = gradient.of_write(call.rule, dot, keys, state, _values(dstates))
    found = jax.tree.map(jnp.add, found, own)
    dk_ref[...] = found.k.astype(dk_ref.dtype)
    dv_ref[...] = found.v.astype(dv_ref.dtype)
    if found.fine is not None:
        dfine_ref[...] = jnp.sum(found.fine.col, 1) + jnp.sum(found.fine.row, 0)


def _summed(of: Callable[[Any], Any], members: int) -> Any:
    """The sum of ``of(g)`` over the query heads ``g`` of a group."""

    def add(g: Any, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, of(g))

    # A loop keeps its sum in registers; a single member needs no loop.
    first = of(0)
    return (
        first
        if members == 1
        else repeat(members - 1, lambda g, total: add(g + 1, total), first)
    )


def _keys(refs: ChunkInputs) -> ChunkKeys:
    values = Marks(*(None if ref is None else ref[...] for ref in refs.marks))
    k, v = refs.k[...].astype(jnp.float32), refs.v[...].astype(jnp.float32)
    return ChunkKeys(k, v, marks.pairs(values))


def _values(refs: State) -> State:
    return jax.tree.map(lambda ref: ref[...], refs)


def _member(cotangent: ChunkOutputs, g: Any) -> tuple[Any, Any]:
    """The cotangents of the output and the normaliser of query head ``g``."""
    total = None if cotangent.total is None else cotangent.total[g][:, None]
    return cotangent.out[g].astype(jnp.float32), total


# --- what kernels see ---


def _ready(chunks: ChunkInputs, call: LinearCall) -> ChunkInputs:
    """The arrays padded to sizes that Triton can multiply.

    Raises:
      ValueError: the chunk is not a power of two, or is too short.
    """
    if call.chunk != power_of_two(call.chunk):
        raise ValueError(
            f"a chunk of {call.chunk}: impl='triton' needs a power of two of at least "
            f"{SMALLEST}, such as {power_of_two(call.chunk)}"
        )

    def array(x: jax.Array) -> jax.Array:
        # A state outgrows the range of f16.
        x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
        return pad(x, x.ndim - 1, power_of_two(x.shape[-1]))

    q, k, v, of_positions = chunks
    return ChunkInputs(array(q), array(k), array(v), of_positions)


def _chunk_specs(chunks: ChunkInputs, call: LinearCall, members: int) -> ChunkInputs:
    """The specs of a chunk: keys, and the queries of ``members`` of the group."""

    def keys(x: Any) -> pl.BlockSpec:
        shape = None, call.chunk, x.shape[-1]
        return pl.BlockSpec(shape, lambda c, h, g: (h, c, 0))

    mark = pl.BlockSpec((None, None, call.chunk), lambda c, h, g: (h, c, 0))
    q = _row_specs(ChunkOutputs(chunks.q, None), call, members).out
    of_positions = jax.tree.map(lambda _: mark, chunks.marks)
    return ChunkInputs(q, keys(chunks.k), keys(chunks.v), of_positions)


def _row_specs(rows: ChunkOutputs, call: LinearCall, members: int) -> ChunkOutputs:
    """The specs of a chunk of outputs of ``members`` of the group."""
    shape = None, members, call.chunk
    out = pl.BlockSpec((*shape, rows.out.shape[-1]), lambda c, h, g: (h, g, c, 0))
    total = pl.BlockSpec(shape, lambda c, h, g: (h, g, c))
    return ChunkOutputs(out, None if rows.total is None else total)


def _state_specs(states: State) -> State:
    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda c, h, g: (h, c, 0, 0))

    return jax.tree.map(spec, states)


def _options(call: LinearCall) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=call.num_warps, num_stages=call.num_stages)
