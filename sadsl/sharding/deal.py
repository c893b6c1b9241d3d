"""Deals the arrays of a call to devices, runs it there, and joins the results."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lowering.partition.shards import Shards
from pallas_kernels.precision import wide
from sadsl.run import dropout_seeds
from sadsl.run.attend import attend
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.sharding import recurrent as recurrent
from sadsl.sharding import summaries as summaries
from sadsl.sharding.attend import attend_shard
from sadsl.sharding.head_parts import HEADS, local_heads
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.sharding.operand_axes import OperandAxes
from sadsl.sharding.shard import Shard
from sadsl.terms.base import DROPOUT_KEY, TRACED_SCALE, Term, read_by


@dataclass(frozen=True)
class ShardedCall:
    """The static part of a sharded call, as one hashable value.

    Attributes:
      term: what runs.
      axes: the mesh, and what is dealt over its axes.
      shards: how positions are dealt.
      setting: the options of the call; ``sm_scale`` is None if it is traced.
      operands: the axes of the run-time arrays, by name.
      return_lse: whether the lse is returned too.
    """

    term: Term
    axes: MeshAxes
    shards: Shards
    setting: Setting
    operands: tuple[tuple[str, OperandAxes], ...]
    return_lse: bool

    def layout(self, name: str, x: Array) -> PartitionSpec:
        """The layout of a run-time array over the mesh."""
        found = dict(self.operands).get(name)
        if found is None:
            return PartitionSpec()
        places: list[Any] = [None] * x.ndim
        if found.batched and x.shape[0] > 1:
            places[0] = self.axes.batch
        if found.tokens is not None:
            places[found.tokens.axis] = self.axes.sequence
        if found.head_axis is not None and self.deals(x.shape[found.head_axis]):
            places[found.head_axis] = self.axes.heads
        return PartitionSpec(*places)

    def deals(self, num_heads: int) -> bool:
        """Whether an axis of so many heads is dealt; else each device has all."""
        return num_heads % self.axes.size(self.axes.heads) == 0

    def own_heads(self, x: Array, axis: int | None) -> Array:
        """The one head of this device, of an axis that is not dealt.

        An axis of one head is for all heads.
        """
        if axis is None or self.axes.heads is None:
            return x
        count = x.shape[axis]
        if self.deals(count) or count == 1:
            return x
        at = (
            jax.lax.axis_index(self.axes.heads)
            * count
            // self.axes.size(self.axes.heads)
        )
        return jax.lax.dynamic_slice_in_dim(x, at, 1, axis)

    def padded(self, name: str, x: Array) -> Array:
        """A run-time array with entries for all positions of all shards."""
        found = dict(self.operands).get(name)
        if found is None or found.tokens is None:
            return x
        axis, role = found.tokens
        # Padding belongs to the document of the last token.
        return padded(x, axis, self.size(role) * self.shards.count, "edge")

    def size(self, role: str) -> int:
        """The queries ("q") or the keys ("k") of a shard."""
        return self.shards.q_size if role == "q" else self.shards.kv_size


def padded(x: Array, axis: int, size: int, mode: str = "constant") -> Array:
    """``x`` with ``size`` entries along an axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads, mode=mode) if pads[axis][1] else x


def run(
    inputs: QKV, arrays: Mapping[str, Array], functions: Mapping[str, Any],
    call: ShardedCall,
) -> Any:  # fmt: skip
    """The output of a call, perhaps with the lse; see ``_run``.

    Compiled once for each call, unless there are functions among its operands.
    """
    if functions:
        return _run(inputs, arrays, functions, call)
    return _jitted(inputs, arrays, call=call)


def _run(
    inputs: QKV, arrays: Mapping[str, Array], functions: Mapping[str, Any],
    call: ShardedCall,
) -> Any:  # fmt: skip
    """Pads, deals and runs a call.

    ``arrays`` are ``[batch or 1, ...]`` where the operand has a batch axis.
    """
    shards, axes = call.shards, call.axes
    layouts = {name: call.layout(name, x) for name, x in arrays.items()}
    dealt = {name: call.padded(name, x) for name, x in arrays.items()}
    long = [
        padded(x, 1, call.size(role) * shards.count)
        for x, role in zip(inputs, "qkk", strict=True)
    ]
    out_layout = axes.layout()
    whole_heads = PartitionSpec(axes.batch, axes.sequence)
    in_layouts = [out_layout if call.deals(x.shape[2]) else whole_heads for x in long]
    lse_layout = PartitionSpec(axes.batch, axes.heads, axes.sequence)
    local: Any = jax.shard_map(
        partial(_local, functions=functions, call=call),
        mesh=axes.mesh,
        in_specs=(*in_layouts, layouts),
        out_specs=(out_layout, lse_layout) if call.return_lse else out_layout,
        # The interpreter of Pallas cannot say along which axes a value varies.
        check_vma=not call.setting.interpret,
    )
    long = [axes.placed(x, y) for x, y in zip(long, in_layouts, strict=True)]
    placed = {name: axes.placed(x, layouts[name]) for name, x in dealt.items()}
    found = local(*long, placed)
    if not call.return_lse:
        return _cut(found, 1, out_layout, call)
    out, lse = found
    return _cut(out, 1, out_layout, call), _cut(lse, 2, lse_layout, call)


def _cut(x: Array, axis: int, layout: PartitionSpec, call: ShardedCall) -> Array:
    """A result without padding."""
    length = call.shards.q_seq_len
    if x.shape[axis] == length:
        return x
    # No axis of a mesh divides what is left.
    whole = (None if i == axis else name for i, name in enumerate(layout))
    x = call.axes.placed(x, PartitionSpec(*whole))
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


@partial(jax.jit, static_argnames="call")
def _jitted(inputs: QKV, arrays: Mapping[str, Array], *, call: ShardedCall) -> Any:
    return _run(inputs, arrays, {}, call)


def _local(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], *,
    functions: Mapping[str, Any], call: ShardedCall,
) -> Any:  # fmt: skip
    """The part of one device."""
    given: dict[str, Any] = {**arrays, **functions}
    setting, axes = call.setting, call.axes
    if setting.sm_scale is None:
        setting = replace(setting, sm_scale=given.pop(TRACED_SCALE))
    if DROPOUT_KEY in given and axes.batch is not None:
        first = jax.lax.axis_index(axes.batch) * q.shape[0]
        given[dropout_seeds.ENTRY] = jnp.int32(first)[None]
    if axes.heads is not None:
        given = _at_local_heads(given, q.shape[2], call)
        k, v = call.own_heads(k, 2), call.own_heads(v, 2)
    found = _outcome((q, k, v), given, replace(call, setting=setting))
    if not call.return_lse:
        return found.out
    if found.lse is None:
        raise NotImplementedError(
            f"return_lse=True: {call.term!r} has more than one normaliser, so a query "
            "has no single log-sum-exp: leave it False"
        )
    return found.out, found.lse.astype(wide(q.dtype))


def _at_local_heads(
    given: Mapping[str, Any], count: int, call: ShardedCall
) -> dict[str, Any]:
    """The arrays for the local heads, ``count`` of them."""
    known = dict(call.operands)
    found = {
        name: call.own_heads(x, known[name].head_axis) if name in known else x
        for name, x in given.items()
    }
    first = jax.lax.axis_index(call.axes.heads) * count
    found[HEADS] = local_heads(first, count)
    if DROPOUT_KEY in given:
        found[dropout_seeds.HEAD] = jnp.int32(first)[None]
    return found


def _outcome(inputs: QKV, given: Mapping[str, Any], call: ShardedCall) -> Outcome:
    sequence = call.axes.sequence
    if sequence is None or call.shards.count == 1:
        return attend(call.term, inputs, read_by(call.term, given), call.setting)
    known = dict(call.operands)
    shard = Shard(sequence, call.shards, inputs, given, known, call.setting)
    return attend_shard(call.term, shard)
