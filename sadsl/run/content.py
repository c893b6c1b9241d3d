"""Lets the selections of a call choose keys, from its arrays."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from sadsl.run.operands import check_operands
from sadsl.run.options import Options
from sadsl.run.symbolic_batch import entry_by_entry, is_symbolic
from sadsl.selections.base import (
    Content,
    Selection,
    by_entry,
    choose,
    operands_of,
)
from sadsl.terms.base import TRACED_SCALE
from sadsl.terms.moved import OFFSET


def with_parts(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options
) -> Mapping[str, Array]:
    """The arrays that the map reads, with the choices of its selections.

    A selection that simplification has removed from the map does not choose.
    """
    if not options.selections:
        return arrays
    read = options.read
    needed = tuple(s for s in options.selections if any(map(s.owns, read)))
    # The reference evaluates bools; kernels read bits.
    pack = options.setting.impl != "reference"
    found = choose(needed, content_of(q, k, arrays, options), pack=pack)
    arrays = {**arrays, **found}
    known = operands_of(options.term.map)
    arrays = {name: x for name, x in arrays.items() if name in known}
    mine = {name: x for name, x in arrays.items() if name in read}
    check_operands(mine, options.stages)
    return arrays


def chosen_parts(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options
) -> dict[str, Array]:
    """The choices of the selections of a call, by the names that its map reads."""

    def chosen(q: Array, k: Array, arrays: Mapping[str, Array]) -> dict[str, Array]:
        content = content_of(q, k, arrays, options)
        as_lists = [s for s in options.selections if _wants_list(s, options)]
        found = {s.key("listed"): _listed(s, content) for s in as_lists}
        rest = tuple(s for s in options.selections if s not in as_lists)
        return found | choose(rest, content)

    if is_symbolic(q):
        return entry_by_entry(chosen, q, k, arrays)
    return chosen(q, k, arrays)


def _wants_list(choice: Selection, options: Options) -> bool:
    wanted = options.setting.config.lists
    return bool(wanted) and choice.list_shape(options.problem) is not None


def _listed(choice: Selection, content: Content) -> Array:
    """The lists of a selection, if they were not given."""
    given = content.given.get(choice.key("listed"))
    return by_entry(choice.choose_lists, content) if given is None else given


def content_of(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options
) -> Content:
    """All that selections may look at; q and k are ``[batch, heads, seq, dim]``."""
    scale = options.setting.sm_scale
    if scale is None:
        # A traced scale may be of float64; scores are of float32.
        scale = jnp.asarray(arrays[TRACED_SCALE], jnp.float32)
    return Content(
        q=jnp.swapaxes(q, 1, 2),
        k=jnp.swapaxes(k, 1, 2),
        given=arrays,
        sm_scale=scale,
        q_offset=options.problem.q_offset,
        position=arrays.get(OFFSET),
    )
