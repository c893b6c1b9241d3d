"""How each chunk changes the state: ``S <- whole S + writes^T (values - W S)``."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear import xla
from pallas_kernels.linear.call import ChunkInputs, LinearCall
from pallas_kernels.linear.chunk import (
    ChunkKeys,
    erase_reads,
    erased_pairs,
    in_last_run,
    written_keys,
)
from pallas_kernels.linear.gates import decay_of
from pallas_kernels.linear.inverse import inverse
from pallas_kernels.linear.triton import launch


class Update(NamedTuple):
    """The updates of all chunks.

    Attributes:
      writes: the keys times the decay to the chunk's end, ``[heads, padded,
        features]``.
      values: the values without the erased part, ``[heads, padded, head_dim_v]``.
      erased: ``W``, ``[heads, padded, features]``; None without an erase vector.
      whole: the factor of the state, f32 ``[heads, chunks, 1 or features]``; or None.
      present: whether no reset follows in the chunk, ``[heads, padded]``; or None.
    """

    writes: Any
    values: Any
    erased: Any
    whole: Any
    present: Any


def of_chunks(chunks: ChunkInputs, call: LinearCall) -> Update:
    """The updates of all chunks; elementwise parts in XLA, solves in a kernel."""
    heads, padded, features = chunks.k.shape
    ops = xla.operations(jnp.float32)

    def moved(keys: ChunkKeys) -> tuple[Any, Any, Any]:
        decay = decay_of(keys.gate, keys.marks, ops)
        writes, whole = written_keys(keys, decay)
        run = keys.marks.run
        present = None if run is None else in_last_run(run)[:, 0]
        return writes, None if whole is None else whole.row[0], present

    # The axes in front are chunks and heads.
    by_chunk = xla.keys_of(xla.by_chunk(chunks, call.chunk))
    found = jax.vmap(jax.vmap(moved))(by_chunk)
    writes, whole, present = jax.tree.map(lambda x: x.swapaxes(0, 1), found)
    writes = writes.reshape(heads, padded, features).astype(chunks.v.dtype)
    if present is not None:
        present = present.reshape(heads, padded)
    if chunks.erase is None:
        return Update(writes, chunks.v, None, whole, present)
    specs = launch.chunk_specs(chunks, call, 1)._replace(q=None)
    erased, values = pl.pallas_call(
        partial(_kernel, call=call),
        grid=(padded // call.chunk, heads, 1),
        in_specs=[specs],
        out_specs=[specs.erase, specs.v],
        out_shape=[launch.struct(x, chunks.v.dtype) for x in (chunks.k, chunks.v)],
        name="sadsl_linear_updates",
        **launch.options(call),
    )(chunks._replace(q=None, state=None))
    return Update(writes, values, erased, whole, present)


def _kernel(
    refs: ChunkInputs, erased_ref: Any, values_ref: Any, *, call: LinearCall
) -> None:
    """Computes ``W [chunk, features]`` and ``(I + A)^-1 V [chunk, head_dim_v]``.

    ``refs`` are ``k``, ``erase`` and ``gate [chunk, features]``, ``v [chunk,
    head_dim_v]`` and marks ``[chunk]``.
    """
    assert refs.k.shape == refs.erase.shape == erased_ref.shape
    assert refs.v.shape == values_ref.shape
    ops, keys = launch.operations(refs.v.dtype), launch.keys_of(refs)
    decay = decay_of(keys.gate, keys.marks, ops)
    inverted = inverse(erased_pairs(call.rule, keys, decay), ops.dot)
    reads = erase_reads(call.rule, keys, decay)
    erased_ref[...] = ops.dot(inverted, reads, (1, 0)).astype(erased_ref.dtype)
    values_ref[...] = ops.dot(inverted, keys.v, (1, 0)).astype(values_ref.dtype)
