"""Runs one softmax over the pairs of a map, on any backend."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowering import ir
from lowering.bias.nodes import resolved
from lowering.run_time import bias_values
from pallas_kernels import dispatch
from pallas_kernels.precision import wide, widened
from pallas_kernels.shared_values import loaded_once
from sadsl.maps.base import IndexMap
from sadsl.run import (
    dropout_seeds,
    head_orders,
    lists,
    merging,
    observed,
    reference,
)
from sadsl.run.attend import attend, choose
from sadsl.run.content import chosen_parts, with_parts
from sadsl.run.kernels import choose_tiles, kernel_call, prepare
from sadsl.run.operands import call_arrays
from sadsl.run.options import Options, options_of, problem_of, traced_scale
from sadsl.run.query_scale import scaled
from sadsl.run.symbolic_batch import KNOWN_SIZES, entry_by_entry, is_symbolic
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import DROPOUT_KEY, TRACED_SCALE, read_by, reads
from sadsl.terms.softmax import Softmax


@attend.register
def _(
    term: IndexMap, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """A bare map means the softmax over its pairs."""
    return attend(Softmax(term), inputs, given, setting)


@attend.register
def _(
    term: Softmax, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """One softmax over the pairs of a map.

    Raises:
      ValueError: an operand is missing, unknown, or has the wrong shape.
    """
    if term.scale is not None:
        q = scaled(inputs[0], term.scale, problem_of(inputs, setting), given)
        term = replace(term, scale=None)
        return attend(term, (q, *inputs[1:]), read_by(term, given), setting)
    given_inputs, inputs = inputs, _with_values(term, inputs)
    options = options_of(inputs, term, setting)
    handled_here = (term.sink, *dropout_seeds.NAMES)
    operands = {name: x for name, x in given.items() if name not in handled_here}
    arrays = call_arrays(options, operands, inputs[0].shape[0])
    if setting.dropout_rate:
        arrays |= {n: given[n] for n in dropout_seeds.NAMES if n in given}
        arrays[DROPOUT_KEY] = dropout_seeds.key_words(given[DROPOUT_KEY])
    arrays |= traced_scale(setting)
    parts = head_orders.ranges(options, inputs)
    if parts:
        each = [attend(p.term, p.of(given_inputs), {}, setting) for p in parts]
        found = merging.beside(each)
        out, lse = found.out, found.lse
    else:
        zeros = observed.noted(options, inputs)
        out, lse = zeros or traced(*inputs, arrays, options=options)
    if term.sink is None:
        return Outcome(out, lse)
    return merging.with_sink(out, lse, sinks_of(term, given, inputs[0]))


def _with_values(term: Softmax, inputs: QKV) -> QKV:
    """The inputs, with the channels of ``k`` for ``v`` if ``term.values`` says so.

    Raises:
      ValueError: the values are no channels of the keys, or v has another shape.
    """
    q, k, v = inputs
    if term.values is None:
        return inputs
    if v.shape != k.shape or term.values[1] > k.shape[-1]:
        raise ValueError(
            f"{term!r} takes its values from the keys: pass k for v, with at least "
            f"{term.values[1]} channels; k has shape {k.shape}, v {v.shape}"
        )
    return q, k, k[..., slice(*term.values)]


@choose.register
def _(
    term: IndexMap, inputs: tuple[Array, Array], given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:  # fmt: skip
    """The choices of the selections in a map."""
    return choose(Softmax(term), inputs, given, setting)


@choose.register
def _(
    term: Softmax, inputs: tuple[Array, Array], given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:  # fmt: skip
    """The choices of the selections in the map of a softmax."""
    q, k = inputs
    if term.scale is not None:
        q = scaled(q, term.scale, problem_of((q, k), setting), given)
    options = options_of((q, k), Softmax(term.map), setting)
    # The arrays of the bias and the sinks have no part in a choice.
    unread = [name for name in term.operands if not reads(term.map, name)]
    mine = {name: x for name, x in given.items() if name not in unread}
    arrays = call_arrays(options, mine, q.shape[0])
    arrays |= traced_scale(setting)
    return chosen_parts(q, k, arrays, options)


def sinks_of(term: Softmax, given: Mapping[str, Any], q: Array) -> Array:
    """The sink logits, ``[batch or 1, q_seq or 1, heads]``.

    Raises:
      ValueError: the operand was not given, or has another shape.
    """
    batch, length, heads, _ = q.shape
    if term.sink not in given:
        raise ValueError(
            f"{term!r} reads its sinks from {term.sink!r}, which was not given: pass "
            f"operands={{{term.sink!r}: array}} with a float for each of {heads} heads"
        )
    sinks = jnp.asarray(given[term.sink])
    of_queries = (1, length, heads), (batch, length, heads)
    if sinks.shape not in ((heads,), (1, heads), (batch, heads), *of_queries):
        raise ValueError(
            f"operand {term.sink!r} has shape {sinks.shape}: the sinks of {term!r} "
            f"must have shape ({heads},), one number for each head, or "
            f"{(batch, heads)}, or {(batch, length, heads)} with one for each query; "
            "the batch axis may be 1"
        )
    if sinks.ndim == 1:
        sinks = sinks[None]
    return sinks[:, None] if sinks.ndim == 2 else sinks


@partial(jax.jit, static_argnames=("options",))
def traced(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], *, options: Options
) -> tuple[Array, Array]:
    """Output ``[batch, q, heads, dim_v]`` and lse ``[batch, heads, q]`` of a call.

    ``arrays`` are the checked run-time arrays ``[batch or 1, ...]``. With dropout, they
    hold the words of its key.
    """
    by_entry = options.selections or options.setting.dropout_rate
    by_entry = by_entry or any(x.ndim and is_symbolic(x) for x in arrays.values())
    if is_symbolic(q) and (by_entry or options.setting.impl in KNOWN_SIZES):
        if options.setting.dropout_rate:
            entry = jnp.arange(q.shape[0], dtype=jnp.int32)
            arrays = {**arrays, dropout_seeds.ENTRY: entry}
        return entry_by_entry(partial(_run, options=options), q, k, v, arrays)
    return _run(q, k, v, arrays, options=options)


def _run(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], *, options: Options
) -> tuple[Array, Array]:
    form = lists.form_of(options, k.shape[2], arrays)
    if form is not None:
        return _by_lists(q, k, v, arrays, options, form)
    known = {*options.of_bias, *dropout_seeds.NAMES, TRACED_SCALE}
    own = {name: x for name, x in arrays.items() if name in known}
    chosen = {**with_parts(q, k, arrays, options), **own}
    run = _dense if options.setting.impl == "reference" else _kernels
    return _scaled(run, q, k, v, chosen, options)


def _scaled(
    run: Any, q: Array, k: Array, v: Array, arrays: Mapping[str, Array],
    options: Options,
) -> tuple[Array, Array]:  # fmt: skip
    """``run(q, k, v, arrays, options)``, where ``options`` have a scale."""
    if options.setting.sm_scale is not None:
        return run(q, k, v, arrays, options)
    # The scale of a kernel is a constant, so a traced scale multiplies q instead. In
    # the wide dtype that product is not rounded. k and v are widened too, since kernels
    # take arrays of one dtype.
    dtype, scale = q.dtype, arrays[TRACED_SCALE]
    q, k, v = map(widened, (q, k, v))
    q = q * scale.astype(q.dtype)
    out, lse = run(q, k, v, arrays, options.with_scale(1.0))
    return out.astype(dtype), lse


def _by_lists(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options,
    form: lists.ListForm,
) -> tuple[Array, Array]:  # fmt: skip
    """The pairs of a choice by lists, and the other pairs of the map beside them."""
    listed = lists.listed(q, k, arrays, options, form)

    def run(q: Array, k: Array, v: Array, arrays: Any, options: Options) -> Any:
        return lists.attend(q, k, v, arrays, options, form)

    found = _scaled(run, q, k, v, {**arrays, lists.LISTED: listed}, options)
    if form.base is None:
        return found
    base = replace(options, term=replace(options.term, map=form.base))
    read = {n: x for n, x in arrays.items() if reads(base.term, n)}
    read |= {n: x for n, x in arrays.items() if n == TRACED_SCALE}
    parts = [Outcome(*_run(q, k, v, read, options=base)), Outcome(*found)]
    whole = merging.merge(parts)
    assert whole.lse is not None
    return whole.out, whole.lse


def _dense(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options
) -> tuple[Array, Array]:
    allowed = allowed_pairs(arrays, options)
    factor, rate = None, options.setting.dropout_rate
    if rate:
        dtype = wide(q.dtype)
        of_pairs = arrays, q.shape[0], options.problem, rate, dtype
        factor = dropout_seeds.of_all_pairs(*of_pairs)
    return reference.attention(
        q, k, v, allowed,
        sm_scale=options.setting.sm_scale, logits_soft_cap=options.term.logits_soft_cap,
        bias=_dense_bias(arrays, options, q.dtype), factor=factor,
    )  # fmt: skip


def allowed_pairs(arrays: Mapping[str, Array], options: Options) -> Array:
    """The pairs of every head, bool ``[batch or 1, heads, q, kv]``, not simplified."""
    problem = options.problem
    program = options.stages["resolve_heads"]
    maps = tuple(without_missing(node, arrays) for node in program.maps)
    # An operand that is indexed by the head reads the entry of this head.
    nodes = tuple(
        ir.substitute(maps[m], {"h": ir.Const(head)})
        for head, m in enumerate(program.map_of_head)
    )
    return reference.pairs(nodes, problem.q_seq_len, problem.kv_seq_len, arrays)


def without_missing(node: ir.Pred, arrays: Mapping[str, Array]) -> ir.Pred:
    """The map as it is written, with 0 for the arrays that are not there.

    ``check_operands`` has made sure that the map does not depend on those.
    """

    def rule(part: ir.Node) -> ir.Node | None:
        absent = isinstance(part, ir.Operand) and part.name not in arrays
        return ir.Const(0) if absent else None

    return ir.rewrite(node, rule)


def _dense_bias(
    arrays: Mapping[str, Array], options: Options, dtype: Any
) -> Array | None:
    """The bias of every pair, evaluated from its expression."""
    if options.score is None:
        return None
    problem = options.problem
    places = bias_values.BiasPlaces(
        jnp.arange(problem.q_seq_len, dtype=jnp.int32)[None, None, :, None],
        jnp.arange(problem.kv_seq_len, dtype=jnp.int32)[None, None, None, :],
        problem,
        arrays,
        dtype=wide(dtype),
    )
    return bias_values.dense(resolved(options.score, problem), places)


def _kernels(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options
) -> tuple[Array, Array]:
    tiles = choose_tiles(options, q.shape[-1], v.shape[-1], q.dtype)
    dtype = wide(q.dtype)
    ready = prepare(arrays, options, tiles, dtype)
    inputs = ready.to_slots(q, k, v)
    call, vectors = kernel_call(options, ready.stages, tiles, dtype), ready.vectors
    impl = options.setting.impl
    call = replace(call, values=loaded_once(options.term.values, k.shape[-1], impl))
    if options.setting.dropout_rate:
        order, problem = ready.stages.layouts or ready.orders, options.problem
        vectors = dropout_seeds.with_seeds(vectors, arrays, q.shape[0], problem, order)
    found = dispatch.attend(inputs, vectors, ready.masks, call, impl=impl)
    return ready.to_positions(*found)
