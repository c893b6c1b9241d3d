"""``sharded_attention``: attention whose arrays are dealt to the devices of a mesh."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from lowering.partition.shards import Shards
from pallas_kernels.config import KernelConfig
from sadsl.run import checks
from sadsl.run.backends import choose_impl
from sadsl.run.call import (
    Ids,
    Keys,
    Lse,
    Out,
    Queries,
    Values,
    attention,
    given_arrays,
)
from sadsl.run.operands import with_batch_axis
from sadsl.run.types import QKV, Setting
from sadsl.sharding import deal
from sadsl.sharding.deal import ShardedCall
from sadsl.sharding.head_parts import DECAYS, decays_of, of_local_heads
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.sharding.operand_axes import OperandAxes, operand_axes
from sadsl.terms.base import DROPOUT_KEY, TRACED_SCALE, Spec, Term, reads
from sadsl.text.specs import any_term


def sharded_attention(
    q: Queries, k: Keys, v: Values, spec: Spec | str, *,
    mesh: Mesh | AbstractMesh, batch: str | tuple[str, ...] | None = None,
    heads: str | None = None, sequence: str | None = None,
    q_segment_ids: Ids | None = None, kv_segment_ids: Ids | None = None,
    operands: Mapping[str, Any] | None = None, sm_scale: float | Array | None = None,
    return_lse: bool = False, impl: str | None = None, interpret: Any = False,
    config: KernelConfig | None = None, dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Out | tuple[Out, Lse]:  # fmt: skip
    """``attention`` with the batch, the heads and the sequence on axes of a mesh.

    Arrays and result are those of the whole call. Which keys travel to the queries of a
    device follows from the map: none, a halo, a few that all share, those of some
    devices, or all. Selections choose among all keys, and dropout drops the weights of
    ``attention``. What cannot be dealt, each device computes whole; ``shard_plan`` says
    where, and how many bytes travel.

    Args:
      q, k, v, spec: as in ``attention``. Lengths need not be multiples of the shards.
      mesh, batch, heads, sequence: the devices, and the axes that each is dealt over.
      q_segment_ids, kv_segment_ids, operands: arrays of the whole call.
      sm_scale, return_lse, impl, interpret, config, dropout_rate, dropout_key: as in
        ``attention``.

    Raises:
      ValueError: the mesh lacks an axis, or batch or heads do not fit theirs.
      ValueError, NotImplementedError: as in ``attention``.

    Example:
      >>> import jax, jax.numpy as jnp, sadsl as sa
      >>> mesh = jax.make_mesh((1,), ("seq",))
      >>> x, v = jnp.zeros((1, 4, 1, 2)), jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> out = sa.sharded_attention(x, x, v, "window(1)", mesh=mesh, sequence="seq")
      >>> out[0, :, 0, 0].tolist()
      [0.0, 0.5, 1.5, 2.5]
    """
    term, axes = any_term(spec), MeshAxes(mesh, batch, heads, sequence)
    checks.problem(q, k, v, 0, term)
    impl = choose_impl(impl, interpret, q, k, v)
    checks.precision(q.dtype, impl)
    given = given_arrays(operands, q_segment_ids, kv_segment_ids)
    _check_read(term, given)
    functions, arrays = _kinds(given)
    arrays |= _log_decays(term, axes, q.shape[1])
    if axes.size(heads) > 1:
        term = any_term(of_local_heads(term, q.shape[2]))
    known = operand_axes(term, arrays)
    arrays |= _with_batch_axis(known, arrays, len(q))
    rate = checks.dropout(dropout_rate, dropout_key)
    arrays |= {DROPOUT_KEY: jnp.asarray(dropout_key)} if rate else {}
    scale = checks.scale(sm_scale, q.shape[-1])
    if not isinstance(scale, float):
        arrays[TRACED_SCALE], scale = scale, None
    setting = Setting(scale, 0, impl, interpret, config or KernelConfig(), rate)
    shards = Shards(axes.size(sequence), q.shape[1], k.shape[1])
    by_name = tuple(sorted(known.items()))
    call = ShardedCall(term, axes, shards, setting, by_name, return_lse)
    _check_sizes(call, (q, k, v), arrays)
    return deal.run((q, k, v), arrays, functions, call)


def attention_over(axes: MeshAxes | None) -> Callable[..., Any]:
    """``attention``, or ``sharded_attention`` over the axes of a mesh."""
    if axes is None:
        return attention
    where = {"batch": axes.batch, "heads": axes.heads, "sequence": axes.sequence}
    return partial(sharded_attention, mesh=axes.mesh, **where)


def _kinds(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The functions and the arrays among the operands."""
    functions = {n: x for n, x in given.items() if callable(x)}
    arrays = {n: jnp.asarray(x) for n, x in given.items() if n not in functions}
    return functions, arrays


def _with_batch_axis(
    known: Mapping[str, OperandAxes], arrays: Mapping[str, Array], batch: int
) -> dict[str, Array]:
    """The arrays that may have a batch axis, each ``[batch or 1, ...]``.

    Raises:
      ValueError: an array has another rank, or its first axis is not the batch.
    """
    ranks = {n: len(x.roles) for n, x in known.items() if x.batched and n in arrays}
    return with_batch_axis({n: arrays[n] for n in ranks}, ranks, batch)


def _log_decays(term: Term, axes: MeshAxes, length: int) -> dict[str, Array]:
    """The log-decays of all heads ``[length, heads]``, where heads are dealt."""
    decays = decays_of(term) if axes.size(axes.heads) > 1 else None
    if decays is None:
        return {}
    found = jnp.asarray(decays, jnp.float32)
    return {DECAYS: jnp.broadcast_to(found, (length, len(decays)))}


def _check_read(term: Term, given: Mapping[str, Any]) -> None:
    """Refuses arrays that no part of the spec reads.

    Raises:
      ValueError: there is one.
    """
    for name in given:
        if not reads(term, name):
            raise ValueError(
                f"{name!r} was given, but no part of {term!r} reads it: drop it"
            )


def _check_sizes(call: ShardedCall, inputs: QKV, arrays: Mapping[str, Array]) -> None:
    """Checks what is dealt against the mesh.

    Raises:
      ValueError: batch or heads do not fit their axis, or an array has another number
        of tokens than q or k.
    """
    axes, (q, k, v) = call.axes, inputs
    for what, name, size in (
        ("batch", axes.batch, q.shape[0]),
        ("heads", axes.heads, q.shape[2]),
    ):
        if size % axes.size(name):
            raise ValueError(
                f"q has shape {q.shape}: its {what} of {size} is no multiple of the "
                f"{axes.size(name)} devices of {what}={name!r}: use a size that is, or "
                f"{what}=None"
            )
    counts = {"k": k.shape[2], "v": v.shape[2]} | {
        name: arrays[name].shape[found.head_axis]
        for name, found in call.operands
        if name in arrays and found.head_axis is not None
    }
    for name, count in counts.items():
        size = axes.size(axes.heads)
        if count % size and size % count:
            raise ValueError(
                f"{name!r} has {count} heads, and heads={axes.heads!r} has {size} "
                "devices: one must be a multiple of the other: use heads=None, or "
                "another mesh"
            )
    lengths = {"q": call.shards.q_seq_len, "k": call.shards.kv_seq_len}
    for name, found in call.operands:
        if name in arrays and found.tokens is not None:
            at, role = found.tokens
            wanted = lengths[role]
            if arrays[name].shape[at] != wanted:
                raise ValueError(
                    f"operand {name!r} has shape {arrays[name].shape}: its axis {at} "
                    f"must have an entry for each of {wanted} tokens"
                )
