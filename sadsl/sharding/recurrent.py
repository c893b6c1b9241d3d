"""``linear`` and ``delta`` over shards: the state passes along the sequence.

The state after some tokens is ``T S + B``: ``S`` is the state before them, ``B`` the
state of these tokens alone, and ``T`` what they do to an earlier state. Two such pairs
compose, ``(T2 T1, T2 B1 + B2)``, so the states before all shards take a number of steps
that is the logarithm of the number of shards (Hillis and Steele, Data parallel
algorithms, 1986). Then each shard runs from its own state. ``T`` is a factor by head or
channel; where a term erases, it is a matrix, the state that starts from the identity.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import linear as kernels
from pallas_kernels.linear.marks import clipped
from sadsl.run.attend import attend
from sadsl.run.linear import linear_call, prepared, tokens
from sadsl.run.linear_documents import rows_in_order
from sadsl.run.linear_state import REMEMBERED, LinearState, PastDocuments, empty_state
from sadsl.run.recurrence import Arrays, kernel_inputs
from sadsl.run.types import Outcome
from sadsl.sharding.attend import attend_shard
from sadsl.sharding.shard import Shard
from sadsl.sharding.whole import whole
from sadsl.terms.base import STATE
from sadsl.terms.recurrent import SEGMENT_IDS, Recurrent


class StateStep(NamedTuple):
    """What the tokens of some shards do to an earlier state, and their own state.

    ``keep`` is the logarithm of a factor ``[batch, heads, features or 1]``, or a matrix
    ``[batch, heads, features, features]``. ``z`` is None without a normaliser.
    """

    keep: Array
    s: Array  # [batch, heads, features, head_dim_v]
    z: Array | None  # [batch, heads, 1, features]


@attend_shard.register
def _(term: Recurrent, shard: Shard) -> Outcome:
    """The recurrence of a shard, from the state after the shards before it."""
    q, k, _ = shard.inputs
    same_tokens = k.shape[1] == term.steps * q.shape[1]
    if not (term.kind.causal and same_tokens) or term.by_channel_sums:
        return whole(term, shard)
    setting = replace(shard.setting, return_state=False)
    before, continues = _documents(term, shard)
    given = shard.of(term)
    start = empty_state(term, len(q), 1, 1, 1)
    if term.positional:
        given[STATE] = start._replace(position=shard.first_query)
    at = tokens(term, shard.inputs, given, setting)
    arrays, rule = prepared(term, at, given, setting)
    call = linear_call(arrays, rule, setting)
    own = _own_step(arrays, call, at.ids, continues)
    state = _states_before(shard, own)
    position = shard.first_query if term.positional else None
    z = None if state.z is None else state.z[:, :, 0]
    given[STATE] = LinearState(state.s, z, before, position)
    found = attend(term, shard.inputs, given, setting)
    if before is None:
        return found
    return found._replace(out=_where_in_order(found.out, shard))


def _documents(
    term: Recurrent, shard: Shard
) -> tuple[PastDocuments | None, Array | None]:
    """The document of the token before the shard, and whether it goes on."""
    if not term.kind.segments:
        return None, None
    ids = shard.given[SEGMENT_IDS[1]]
    ids = jnp.broadcast_to(ids, (len(shard.inputs[1]), ids.shape[1])).astype(jnp.int32)
    last = _from_before(shard, ids[:, -1:], 1)
    is_first = shard.index == 0
    continues = (last[:, 0] == ids[:, 0]) & ~is_first
    count = jnp.where(is_first, 0, 1) * jnp.ones(len(ids), jnp.int32)
    return PastDocuments(jnp.repeat(last, REMEMBERED, axis=1), count), continues


def _own_step(
    arrays: Arrays, call: kernels.LinearCall, ids: Any, continues: Array | None
) -> StateStep:
    """What the tokens of this shard do."""
    if ids is not None:
        # Only the last document goes on behind the shard.
        last = ids[1] == ids[1][:, -1:]
        arrays = _of_tokens(arrays, last)
    inputs, _ = kernel_inputs(arrays, None, logits=False)
    found = kernels.final_state(inputs, call)
    keep = _kept(inputs, call, found)
    if ids is not None:
        assert continues is not None
        goes_on = continues & (ids[1] == ids[1][:, :1]).all(axis=1)
        none = -jnp.inf if inputs.erase is None else 0.0
        shape = (len(goes_on), *[1] * (keep.ndim - 1))
        keep = jnp.where(goes_on.reshape(shape), keep, none)
    return StateStep(keep, found.s, found.z)


def _of_tokens(arrays: Arrays, there: Array) -> Arrays:
    """The arrays without the writes of tokens that are not ``there``."""

    def kept(x: Array) -> Array:
        return jnp.where(there[:, :, None, None], x, 0)

    erase = None if arrays.erase is None else kept(arrays.erase)
    return arrays._replace(k=kept(arrays.k), v=kept(arrays.v), erase=erase)


def _kept(
    inputs: kernels.LinearInputs, call: kernels.LinearCall, end: kernels.State
) -> Array:
    """What all tokens of the shard keep of an earlier state; see ``StateStep``."""
    batch, heads, features, _ = end.s.shape
    if inputs.erase is not None:
        unit = jnp.broadcast_to(jnp.eye(features), (batch, heads, features, features))
        nothing = jnp.zeros((*inputs.v.shape[:3], features), inputs.v.dtype)
        state = kernels.State(unit.astype(end.s.dtype), None)
        return kernels.final_state(inputs._replace(v=nothing, state=state), call).s
    if inputs.log_decay is None:
        return jnp.zeros((batch, heads, 1), end.s.dtype)
    decay = clipped(inputs.log_decay).astype(end.s.dtype)
    total = decay.sum(axis=2)
    total = total if total.ndim == 3 else total[..., None]
    return jnp.broadcast_to(total, (batch, heads, total.shape[-1]))


def _states_before(shard: Shard, own: StateStep) -> StateStep:
    """The state after all shards before this one."""
    step, distance = own, 1
    while distance < shard.shards.count:
        earlier = jax.tree.map(_sender(shard, distance), step)
        if step.keep.ndim == 4:
            # A shard without an earlier one keeps its matrix.
            alone = shard.index < distance
            unit = jnp.eye(step.keep.shape[-1], dtype=step.keep.dtype)
            keep = jnp.where(alone, unit, earlier.keep)
            earlier = earlier._replace(keep=keep)
        step = _after(earlier, step)
        distance *= 2
    return jax.tree.map(_sender(shard, 1), step)


def _after(a: StateStep, b: StateStep) -> StateStep:
    """The step of the tokens of ``a`` and then those of ``b``."""
    matrix = b.keep.ndim == 4
    keep = _product(b.keep, a.keep) if matrix else b.keep + a.keep
    s = b.s + (_product(b.keep, a.s) if matrix else jnp.exp(b.keep)[..., None] * a.s)
    if b.z is None or a.z is None:
        return StateStep(keep, s, None)
    assert not matrix, "terms that erase have no normaliser"
    return StateStep(keep, s, b.z + jnp.exp(b.keep)[:, :, None] * a.z)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _sender(shard: Shard, distance: int) -> Callable[[Array], Array]:
    return lambda x: _from_before(shard, x, distance)


def _from_before(shard: Shard, x: Array, distance: int) -> Array:
    """``x`` of the shard at some distance before; 0 for the first shards."""
    count = shard.shards.count
    pairs = [(i, i + distance) for i in range(count - distance)]
    return jax.lax.ppermute(x, shard.axis, pairs)


def _where_in_order(out: Array, shard: Shard) -> Array:
    """The output, NaN where a document comes back after another one.

    A state keeps one document, and traced ids cannot be refused.
    """
    q_ids, kv_ids = (
        shard.gathered(shard.given[name], 1, length)
        for name, length in zip(
            SEGMENT_IDS,
            (shard.shards.q_seq_len, shard.shards.kv_seq_len),
            strict=True,
        )
    )
    fits = rows_in_order(q_ids, kv_ids)
    return jnp.where(fits.reshape(-1, 1, 1, 1), out, jnp.nan)
