"""Linear attention on NVIDIA GPUs: chunks in parallel, with stored states.

It is the chunkwise form in which states are stored (Yang et al., Gated Linear
Attention, 2024, section 3; with erase vectors: Yang et al., Parallelizing Linear
Transformers with the Delta Rule, 2024, section 3):

- ``updates``: for each chunk ``W = (I + A)^-1 E`` and ``(I + A)^-1 V``, with an erase
  vector only. So the values that its keys write are ``U = (I + A)^-1 V - W S``.
- ``states``: a loop over chunks, in parallel over heads and slices of values.
- ``outputs``: for each chunk, its outputs from ``U`` and the state at its start.

The backward pass goes through them in the opposite order.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.call import ChunkInputs, ChunkOutputs, LinearCall
from pallas_kernels.linear.chunk import State
from pallas_kernels.linear.marks import Marks
from pallas_kernels.linear.triton import outputs, states, updates
from pallas_kernels.triton.launch import pad
from pallas_kernels.triton.tiles import SMALLEST, power_of_two


def forward(chunks: ChunkInputs, call: LinearCall) -> ChunkOutputs:
    """The outputs and normalisers of all queries, and the state after all keys."""
    given = chunks
    chunks = _ready(chunks, call)
    update = updates.of_chunks(chunks, call)
    found = states.forward(chunks, update, call)
    out, total = outputs.forward(chunks, found, call, given.q.dtype)
    end = _cut(found.end, given.state)
    return ChunkOutputs(out[..., : given.v.shape[-1]], total, end)


def backward(
    chunks: ChunkInputs, cotangent: ChunkOutputs, call: LinearCall
) -> ChunkInputs:
    """The cotangents of all arrays, of ``marks`` only those of ``fine``."""
    given = chunks
    chunks = _ready(chunks, call)
    cotangent = ChunkOutputs(
        pad(cotangent.out.astype(chunks.v.dtype), 3, chunks.v.shape[-1]),
        cotangent.total,
        _padded(cotangent.state, chunks.state),
    )
    update = updates.of_chunks(chunks, call)
    found = states.forward(chunks, update, call)
    dq, own = outputs.backward_queries(chunks, found, cotangent, call)
    ends = states.backward(update, own, cotangent.state, call)
    of_keys = outputs.backward_keys(chunks, found, cotangent, ends, call)
    dkeys = of_keys._replace(q=dq, state=ends.start)

    def cut(x: jax.Array, like: jax.Array) -> jax.Array:
        return x[..., : like.shape[-1]].astype(like.dtype)

    arrays = jax.tree.map(
        cut, dkeys._replace(marks=Marks(), state=None),
        given._replace(marks=Marks(), state=None),
    )  # fmt: skip
    state = _cut(dkeys.state, given.state)
    return arrays._replace(marks=Marks(of_keys.marks.fine), state=state)


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

    arrays = jax.tree.map(array, chunks._replace(marks=Marks(), state=None))
    features, head_dim_v = arrays.k.shape[-1], arrays.v.shape[-1]
    s, z = chunks.state
    s = pad(pad(s, 1, features), 2, head_dim_v)
    z = None if z is None else pad(z, 2, features)
    return arrays._replace(marks=chunks.marks, state=State(s, z))


def _padded(state: State, like: State) -> State:
    """The state padded with zeros to the sizes of ``like``."""

    def fitted(x: jax.Array, shaped: jax.Array) -> jax.Array:
        for axis in range(x.ndim):
            x = pad(x, axis, shaped.shape[axis])
        return x

    return jax.tree.map(fitted, state, like)


def _cut(state: State, like: State) -> State:
    """The state without its padding."""
    return jax.tree.map(
        lambda x, shaped: x[tuple(map(slice, shaped.shape))], state, like
    )
