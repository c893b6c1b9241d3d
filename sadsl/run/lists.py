"""Runs a choice of single keys by lists instead of bits, where that pays.

A map with a choice ``S`` that only adds pairs is ``base | (S & rest)``: ``base`` are
the pairs that it has whatever is chosen, and ``rest`` are those that ``S`` may add. The
pairs of ``base`` run as blocks, those of ``S & rest`` by list, and both are merged by
their log-sum-exps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lowering import ir, pipeline
from lowering.expr.assume import envelope
from lowering.expr.kernel_test import KernelPredicate
from lowering.pipeline import Stages
from lowering.problem import Problem
from lowering.run_time.lists import ListCounts, is_positive, visited_pairs
from lowering.run_time.vectors import vectors_of
from pallas_kernels.call import Inputs, Vectors
from pallas_kernels.lists import dispatch
from pallas_kernels.lists.call import ListCall
from pallas_kernels.shared_values import loaded_once
from sadsl.maps.base import IndexMap
from sadsl.maps.symbols import Truth
from sadsl.maps.traced_map import traced_map
from sadsl.run.content import content_of
from sadsl.run.options import Options
from sadsl.selections.base import (
    ListShape,
    Selection,
    by_entry,
    selections_of,
    widest,
    with_choice,
)

# The lists among the arrays of a call; no identifier, so no caller's name.
LISTED = "lists.index"


@dataclass(frozen=True)
class ListForm:
    """How a call runs by lists.

    Attributes:
      choice: the selection whose choice is a list.
      shape: the shape of its lists.
      base: the pairs that do not need it; None if there are none.
      stages: the lowered map of the pairs that it may add.
      num_kv_heads: the key heads of the call.
      counts: what lists and bits visit.
      pays: whether lists cost less.
    """

    choice: Selection
    shape: ListShape
    base: IndexMap | None
    stages: Stages
    num_kv_heads: int
    counts: ListCounts
    pays: bool


def form_of(
    options: Options, num_kv_heads: int, given: Mapping[str, Any]
) -> ListForm | None:
    """How a call runs by lists; None if bits cost less, or lists cannot do it.

    Lists that the caller gives are used wherever lists can do it.
    """
    wanted = options.setting.config.lists
    if wanted is False or not options.selections:
        return None
    form = possible_form(options, num_kv_heads)
    if form is None or form.choice.key("chosen") in given:
        return None
    if form.pays or wanted or form.choice.key("listed") in given:
        return form
    return None


def possible_form(options: Options, num_kv_heads: int) -> ListForm | None:
    """How a call could run by lists, whatever it costs; None if it cannot."""
    impl = options.setting.impl
    if impl not in dispatch.BACKENDS or options.term.bias is not None:
        return None
    if options.setting.dropout_rate:
        return None
    return _form(options.term.map, options.problem, num_kv_heads, impl)


@lru_cache(maxsize=256)
def _form(
    map: IndexMap, problem: Problem, num_kv_heads: int, impl: str
) -> ListForm | None:
    for choice in selections_of(map):
        found = _split(map, choice, problem)
        if found is None:
            continue
        base, stages = found
        shape = choice.list_shape(problem)
        assert shape is not None
        heads = problem.num_heads
        keys = shape.rows(problem) * shape.size * shape.block_kv
        groups = shape.groups(heads, num_kv_heads)
        counts = ListCounts(
            listed=keys * max(groups, num_kv_heads),
            listed_pairs=keys * shape.block_q * heads,
            visited=visited_pairs(static_node(map), problem),
            rest=0 if base is None else visited_pairs(static_node(base), problem),
        )
        pays = counts.pays(impl)
        return ListForm(choice, shape, base, stages, num_kv_heads, counts, pays)
    return None


def _split(
    map: IndexMap, choice: Selection, problem: Problem
) -> tuple[IndexMap | None, Stages] | None:
    """The pairs without a choice, and the lowered map of those that it may add.

    None if the map cannot be split by this choice.
    """
    if choice.list_shape(problem) is None:
        return None
    if not is_positive(map.node, choice.key("chosen")):
        return None
    rest, base = (
        with_choice(map, choice, bound(choice, held=x)) for x in (True, False)
    )
    some = not _is_empty(base, problem)
    rest = rest - base if some else rest
    if selections_of(rest):
        return None
    stages = pipeline.run(rest.node, problem)
    program = stages["hoist"]
    vectors = (*program.q_vectors, *program.kv_vectors)
    by_head = any("h" in ir.axes(v) for v in vectors)
    if len(program.maps) > 1 or program.bits or by_head:
        return None
    return (base if some else None), stages


def bound(choice: Selection, *, held: bool) -> IndexMap:
    """All pairs that the choice may have; or those that it has whatever is chosen."""
    return traced_map(Truth(envelope(choice.node, choice.owns, held=held)))


def _is_empty(map: IndexMap, problem: Problem) -> bool:
    maps = pipeline.run(map.node, problem)["simplify"].maps
    return all(node == ir.Bool(False) for node in maps)


def static_node(map: IndexMap) -> ir.Pred:
    """All pairs that the map can have, whatever its run-time arrays hold."""
    return envelope(widest(map), lambda _: True)


def listed(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options, form: ListForm
) -> Int[Array, "batch groups rows size"]:
    """The lists of a call: those given, else those that the selection chooses."""
    given = arrays.get(form.choice.key("listed"))
    if given is not None:
        return given
    content = content_of(q, k, arrays, options)
    return jax.lax.stop_gradient(by_entry(form.choice.choose_lists, content))


def attend(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options,
    form: ListForm,
) -> tuple[Array, Array]:  # fmt: skip
    """Output ``[batch, q, heads, dim_v]`` and lse of the pairs of a choice."""
    program, shape = form.stages["hoist"], form.shape
    lengths, heads = (q.shape[1], k.shape[1]), q.shape[2]
    vectors = Vectors(
        vectors_of(program.q_vectors, lengths[0], heads, arrays),
        vectors_of(program.kv_vectors, lengths[1], heads, arrays),
    )
    impl, values = options.setting.impl, options.term.values
    call = ListCall(
        KernelPredicate(program.maps),
        options.setting.sm_scale,
        shape.block_q,
        shape.block_kv,
        options.term.logits_soft_cap,
        options.setting.interpret,
        loaded_once(values, k.shape[-1], impl, by_lists=True),
        options.setting.config.residual_name,
    )
    inputs = Inputs(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    found = dispatch.attend(inputs, vectors, arrays[LISTED], call, impl=impl)
    return jnp.swapaxes(found.o, 1, 2), found.lse
