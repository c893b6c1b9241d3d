"""Runs ``scatter_mean``: gathers clusters, attends within them, scatters results back.

Each cluster becomes one head of ``window`` slots, which hold copies of its members, and
the ordinary kernels run on these heads. The copies are as large as the arrays if
``num_clusters * window`` is the length. Roy et al., Efficient content-based sparse
attention with Routing Transformers, 2021, section 4.1.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowering import ir, pipeline
from lowering.expr.fits import exact, known_of
from lowering.problem import Problem
from lowering.run_time.slots import Slots, add_up, slots_of, take
from lowering.run_time.vectors import AtPositions, evaluate_outside
from pallas_kernels.precision import wide
from pallas_kernels.varying import vary
from sadsl.maps.base import IndexMap
from sadsl.maps.named import Where, causal, where
from sadsl.run import operands, reference, softmax
from sadsl.run.attend import attend, choose
from sadsl.run.content import content_of
from sadsl.run.options import Options, options_of, traced_scale
from sadsl.run.symbolic_batch import entry_by_entry, is_symbolic
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.selections.base import operands_of
from sadsl.terms.scatter_mean import ScatterMean
from sadsl.terms.softmax import Softmax

# Names of run-time arrays that no operand of a caller can have: the position in each
# slot of queries and of keys, and whether the value in a slot is not 0.
Q_AT, K_AT, K_SEEN = "slot.q", "slot.k", "slot.seen"


class Members(NamedTuple):
    """The members of every cluster, int32 ``[batch, heads, clusters, window]``.

    Positions ascend within a cluster. An empty slot holds the length of the sequence.
    """

    q: Array
    k: Array


@attend.register
def _(
    term: ScatterMean, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """The averaged output. A query has several softmaxes, so there is no lse.

    Raises:
      ValueError: arrays, sizes and options do not fit together.
      NotImplementedError: the call has dropout or a traced scale.
    """
    if setting.dropout_rate:
        raise NotImplementedError(
            f"dropout_rate={setting.dropout_rate}: {term!r} averages several softmaxes "
            "of a query, and dropout on their weights is not implemented: leave it 0"
        )
    if traced_scale(setting):
        raise NotImplementedError(
            f"sm_scale={setting.sm_scale!r} is traced: {term!r} takes a Python number; "
            "multiply q by the traced factor instead"
        )
    if term.own_key == "alone" and setting.q_offset:
        raise ValueError(
            f"q_offset={setting.q_offset}: scatter_mean with own_key='alone' "
            "pairs query i with key i, so it takes q_offset=0"
        )
    options = options_of(inputs, Softmax(term.rest), setting)
    arrays = _arrays(term, given, options, inputs[0].shape[0])
    run = partial(_traced, term=term, options=options)
    if is_symbolic(inputs[0]):
        return Outcome(entry_by_entry(run, *inputs, *arrays), None)
    return Outcome(run(*inputs, *arrays), None)


@choose.register
def _(
    term: ScatterMean, inputs: tuple[Array, Array], given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:  # fmt: skip
    """The members of the clusters by name; a call takes them as operands."""
    q, k = inputs
    options = options_of((q, k), Softmax(term.rest), setting)
    of_clusters, _ = _arrays(term, given, options, q.shape[0])
    members = partial(_chosen, term=term, options=options)
    alone = partial(entry_by_entry, members) if is_symbolic(q) else members
    found = alone(q, k, of_clusters)
    return dict(zip(_names(term), found, strict=True))


def _names(term: ScatterMean) -> list[str]:
    """The names of the members among the operands of a call."""
    return [term.clusters.key(name) for name in Members._fields]


def _arrays(
    term: ScatterMean, given: Mapping[str, Any], options: Options, batch: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The arrays of the clusters and of the rest of the map, with a batch axis each."""
    ranks = {**term.clusters.operands, **dict.fromkeys(_names(term), 3)}
    mine = {name: x for name, x in given.items() if name in ranks}
    others = {name: x for name, x in given.items() if name not in ranks}
    floats = frozenset(term.clusters.operands)
    arrays = operands.operand_arrays(mine, floats=floats)
    of_rest = operands.call_arrays(options, others, batch)
    return operands.with_batch_axis(arrays, ranks, batch), of_rest


@partial(jax.jit, static_argnames=("term", "options"))
def _traced(
    q: Array, k: Array, v: Array, of_clusters: Mapping[str, Array],
    of_rest: Mapping[str, Array], *, term: ScatterMean, options: Options,
) -> Array:  # fmt: skip
    """The output ``[batch, q_seq, num_q_heads, head_dim_v]`` of checked arrays."""
    members = _members(q, k, of_clusters, term, options)
    if term.sm_scale is not None:
        options = options.with_scale(term.sm_scale)
    run = _dense if options.setting.impl == "reference" else _in_clusters
    return run((q, k, v), members, of_rest, term, options)


def _members(
    q: Array, k: Array, arrays: Mapping[str, Array], term: ScatterMean, options: Options
) -> Members:
    """The members as given, or chosen now; no gradient flows through them.

    Raises:
      ValueError: the given members do not have the shape that ``select`` makes.
    """
    clusters = term.clusters
    given = [arrays[name] for name in _names(term) if name in arrays]
    if not given:
        content = content_of(q, k, arrays, options)
        return Members(*clusters.slots(jax.lax.stop_gradient(content)))
    lead = q.shape[2], clusters.num_clusters
    wanted = [(*lead, clusters.size(x.shape[1])) for x in (q, k)]
    if [x.shape[1:] for x in given] != wanted:
        raise ValueError(
            f"the members of {clusters!r} have shapes {[x.shape[1:] for x in given]} "
            f"beside the batch: they must be {wanted}, as select chooses them for "
            "these lengths; choose them anew with select"
        )
    spread = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in given)
    return Members(*(x.astype(jnp.int32) for x in spread))


_chosen = jax.jit(_members, static_argnames=("term", "options"))


def _in_clusters(
    inputs: tuple[Array, Array, Array],
    members: Members,
    of_rest: Mapping[str, Array],
    term: ScatterMean,
    options: Options,
) -> Array:
    """Copies members to slots, attends in every cluster, and averages the results."""
    q, k, v = inputs
    batch, q_seq_len, heads, _ = q.shape
    _, kv_seq_len, kv_heads, _ = k.shape
    num_clusters, window = members.q.shape[2:]
    lead = batch, heads * num_clusters
    q_slots = slots_of(members.q.reshape(batch * heads, -1), q_seq_len)
    kv_slots = slots_of(members.k.reshape(batch * kv_heads, -1), kv_seq_len)
    copies = [
        _to_clusters(x, slots, lead)
        for x, slots in ((q, q_slots), (k, kv_slots), (v, kv_slots))
    ]
    arrays = {
        **of_rest,
        Q_AT: members.q.reshape(*lead, window),
        K_AT: members.k.reshape(*lead, -1),
        K_SEEN: jnp.swapaxes(jnp.any(copies[2] != 0, axis=-1), 1, 2),
    }
    spec = _map_of_slots(term, options.problem, num_clusters)
    config = replace(options.setting.config, relayout=False)
    of_slots = replace(
        options,
        term=Softmax(spec),
        problem=Problem(window, copies[1].shape[1], lead[1]),
        setting=replace(options.setting, config=config),
    )
    known = operands_of(spec)
    read = {name: x for name, x in arrays.items() if name in known}
    out, lse = softmax.traced(*copies, read, options=of_slots)
    if term.own_key == "alone":
        own = _own_pairs(term, options.problem, num_clusters, arrays)
        alone = jnp.isneginf(lse) & own
        out = jnp.where(jnp.swapaxes(alone, 1, 2)[..., None], copies[2], out)
    rows = jnp.swapaxes(out, 1, 2).reshape(batch * heads, -1, out.shape[-1])
    total, count = add_up(rows, q_slots), q_slots.counts[..., None]
    mean = total / (count.astype(total.dtype) + term.eps_count)
    mean = mean.reshape(batch, heads, q_seq_len, -1).astype(q.dtype)
    return jnp.swapaxes(mean, 1, 2)


def _to_clusters(x: Array, slots: Slots, lead: tuple[int, int]) -> Array:
    """``[batch, seq, heads, dim]`` to ``[batch, slots, heads and clusters, dim]``."""
    _, length, _, dim = x.shape
    copies = take(jnp.swapaxes(x, 1, 2).reshape(-1, length, dim), slots)
    return jnp.swapaxes(copies.reshape(*lead, -1, dim), 1, 2)


def _map_of_slots(term: ScatterMean, problem: Problem, num_clusters: int) -> IndexMap:
    """The pairs of slots of a cluster that attend, as a map.

    Members ascend. So a causal map of clusters that queries and keys share is causal in
    the slots too, and needs no run-time plan.
    """
    alone = term.own_key == "alone"
    causal_alone = _simplified(term.rest, problem) == _simplified(causal(), problem)
    shared = term.clusters.share_qk and not problem.q_offset
    if causal_alone and shared and not term.skip_zeros:
        return where(lambda q, k: k < q) if alone else causal()
    q_at, k_at, k_seen = (
        ir.Operand(name, (ir.H, axis))
        for name, axis in ((Q_AT, ir.Q), (K_AT, ir.K), (K_SEEN, ir.K))
    )
    parts = [
        _at_slots(term.rest.node, problem, num_clusters),
        ir.Le(k_at, ir.Const(problem.kv_seq_len - 1)),
    ]
    if alone:
        parts.append(ir.Not(ir.Eq(q_at, k_at)))
    if term.skip_zeros:
        parts.append(ir.Eq(k_seen, ir.Const(1)))
    return Where(ir.And(tuple(parts)))


def _simplified(map: IndexMap, problem: Problem) -> tuple[ir.Pred, ...]:
    """The simplified nodes of a map, to tell equal maps."""
    return pipeline.run(map.node, problem)["simplify"].maps


def _at_slots(node: ir.Pred, problem: Problem, num_clusters: int) -> ir.Pred:
    """Rewrites a map of positions as a map of slots.

    ``q -> position of slot q``, ``k -> position of slot k`` and
    ``h -> h // num_clusters``, since each head has become ``num_clusters`` heads. The
    position of an empty slot is clipped to the last one.
    """
    shifted = pipeline.run(node, problem)["shift_queries"].maps[0]
    head = ir.FloorDiv(ir.H, num_clusters)
    whole = ir.substitute(shifted, {"n": ir.Const(problem.kv_seq_len), "h": head})

    def position(name: str, slot: ir.Expr, length: int) -> ir.Expr:
        at = ir.Operand(name, (ir.H, slot))
        return ir.Max(ir.Min(at, ir.Const(length - 1)), ir.Const(0))

    at_q = position(Q_AT, ir.Q, problem.q_seq_len)
    at_k = position(K_AT, ir.K, problem.kv_seq_len)
    return ir.substitute(whole, {"q": at_q, "k": at_k})


def _own_pairs(
    term: ScatterMean, problem: Problem, num_clusters: int, arrays: Mapping[str, Array]
) -> Array:
    """Whether the rest of the map lets the query of a slot see the key of that slot.

    Bool ``[batch or 1, heads, slots]``.
    """
    node = _at_slots(term.rest.node, problem, num_clusters)
    node = softmax.without_missing(node, arrays)
    heads, window = arrays[Q_AT].shape[1:]
    maps = pipeline.run(node, Problem(window, window, heads))["resolve_heads"]
    slot = jnp.arange(window, dtype=jnp.int32)[None, None, :]
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    at = AtPositions(slot, slot, h=head, operands=arrays)
    known = known_of(window, window, heads)
    own = [evaluate_outside(exact(each, known), at, known) for each in maps.maps]
    batch = max(x.shape[0] if x.ndim == 3 else 1 for x in own)
    spread = jnp.stack([jnp.broadcast_to(x, (batch, heads, window)) for x in own])
    return spread[np.array(maps.map_of_head), :, np.arange(heads)].swapaxes(0, 1)


def _dense(
    inputs: tuple[Array, Array, Array],
    members: Members,
    of_rest: Mapping[str, Array],
    term: ScatterMean,
    options: Options,
) -> Array:
    """The definition: dense attention in one cluster after another."""
    q, k, v = inputs
    lengths = options.problem.q_seq_len, options.problem.kv_seq_len
    program = options.stages["resolve_heads"]
    maps = [softmax.without_missing(node, of_rest) for node in program.maps]
    nodes = tuple(
        ir.substitute(maps[m], {"h": ir.Const(h)})
        for h, m in enumerate(program.map_of_head)
    )
    allowed = reference.pairs(nodes, *lengths, of_rest)
    if term.skip_zeros:
        seen = jnp.swapaxes(jnp.any(v != 0, axis=-1), 1, 2)
        allowed &= jnp.repeat(seen, q.shape[2] // k.shape[2], axis=1)[:, :, None]
    own = np.eye(*lengths, dtype=bool)[None, None]
    dtype = wide(q.dtype)
    wide_q, wide_k, wide_v = (x.astype(dtype) for x in inputs)

    def add(
        total: tuple[Array, Array], of: Members
    ) -> tuple[tuple[Array, Array], None]:
        in_q, in_k = (
            jnp.any(
                at[..., None] == np.arange(n, dtype=np.int32).reshape(1, 1, 1, n),
                axis=2,
            )
            for at, n in zip(of, lengths, strict=True)
        )
        pairs = allowed & in_q[..., None] & in_k[:, :, None]
        if term.own_key == "alone":
            others = pairs & ~own
            pairs = others | (pairs & ~others.any(axis=-1, keepdims=True))
        out, _ = reference.attention(
            wide_q, wide_k, wide_v, pairs, sm_scale=options.setting.sm_scale
        )
        count = jnp.swapaxes(in_q, 1, 2)[..., None].astype(dtype)
        return (total[0] + out, total[1] + count), None

    zero = jnp.zeros((*q.shape[:3], v.shape[3]), dtype)
    none = jnp.zeros((*q.shape[:3], 1), dtype)
    by_cluster = Members(*(jnp.moveaxis(x, 2, 0) for x in members))
    start = vary((zero, none), q, k, v, members)
    (total, count), _ = jax.lax.scan(add, start, by_cluster)
    return (total / (count + term.eps_count)).astype(q.dtype)
