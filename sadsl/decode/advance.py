"""``advance``: a generic function that runs the new tokens of a term on its cache."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from lowering import ir
from sadsl.decode.keys import Axes, K, Seen, V, in_order
from sadsl.decode.layout import by_query
from sadsl.maps.base import IndexMap
from sadsl.run import merging, traced_offset
from sadsl.run.attend import attend
from sadsl.run.few_queries import attend_few
from sadsl.run.heads import slices
from sadsl.run.latent import absorbed_form
from sadsl.run.mixtures import gates_of, weighed
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec, Term, read_by
from sadsl.terms.heads import Heads
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.mixtures import Average, Gated, Joint, Weighted
from sadsl.terms.moved import OFFSET, PairPlaces, of_queries
from sadsl.terms.over import Over
from sadsl.terms.softmax import Softmax

# The position of each slot among the arrays of a call; no identifier, so no name of a
# caller.
SLOT = "slot.position"
AT_SLOT = ir.Operand(SLOT, (ir.K,))
# The most queries that run as rows of one block; more run as a prompt does.
FEW = 16


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a call.

    Attributes:
      inputs: q, k and v of the new tokens, ``[batch, seq, heads, dim]``.
      seen: the keys that they may see, None if no part of the spec keeps keys.
      axes: the axis of the keys in each array of ``seen``.
      given: the arrays of the call.
      count: the number of earlier tokens, a scalar or ``[batch]``.
      valid: how many of the new tokens exist, an integer or ``[batch]``.
      max_len: the most tokens.
      first: whether there are no earlier tokens, so that no cache is read.
      setting: the options of the call.
    """

    inputs: QKV
    seen: Seen | None
    axes: Axes
    given: Mapping[str, Any]
    count: Int[Array, "*batch"]
    valid: Int[Array, " batch"] | int
    max_len: int
    first: bool
    setting: Setting

    def of(self, term: Spec) -> dict[str, Any]:
        """The given arrays that a term reads."""
        return read_by(term, self.given)


@singledispatch
def advance(term: Spec, state: Any, new: NewTokens) -> tuple[Outcome, Any]:
    """The outcome of new tokens, and the state of ``term`` after them.

    Raises:
      NotImplementedError: the term has no cache.
    """
    del state, new
    raise NotImplementedError(
        f"decoding {term!r}: its outputs need more of earlier tokens than a cache "
        "keeps; call attention on the whole sequence"
    )


@advance.register
def _(term: IndexMap, state: None, new: NewTokens) -> tuple[Outcome, None]:
    return advance(Softmax(term), state, new)


@advance.register(Softmax)
@advance.register(LocalLinear)
def _(term: Softmax | LocalLinear, state: None, new: NewTokens) -> tuple[Outcome, None]:
    """Attention over the keys of the cache.

    Few queries read a paged cache where it lies. More queries, choices and ``impl=
    "reference"`` read a copy of it, with the keys of each sequence side by side.
    """
    if new.first:
        return attend(term, new.inputs, new.of(term), new.setting), state
    assert new.seen is not None
    q, seen = new.inputs[0], new.seen
    few = q.shape[1] <= FEW and not selections_of(term) and isinstance(term, Softmax)
    if not few or new.setting.impl == "reference":
        seen = in_order(seen, new.max_len, new.axes)
    placed, given = _placed(term, replace(new, seen=seen))
    k, v = seen.rows[K], seen.rows.get(V)
    if few and isinstance(placed, Softmax):
        table = None if seen.pages is None else seen.pages.table
        return attend_few(placed, (q, k, v), given, new.setting, table), state
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, k if v is None else v))
    # The slots of a cache keep their order.
    config = replace(new.setting.config, relayout=False)
    setting = replace(new.setting, config=config)
    return attend(placed, (q, k, v), given, setting), state


def _placed(term: Term, new: NewTokens) -> tuple[Term, dict[str, Any]]:
    """The term at the positions of the new queries and of the slots, and its arrays."""
    seen = new.seen
    assert seen is not None
    shared = frozenset(by_query(term) & seen.rows.keys())
    places = PairPlaces(length=new.max_len, queries=shared)
    given: dict[str, Any] = {OFFSET: new.count}
    if seen.position is not None:
        places = replace(places, k=AT_SLOT, held=ir.Le(ir.Const(0), AT_SLOT))
        given[SLOT] = seen.position
    given |= {of_queries(name): new.given[name] for name in shared}
    placed = traced_offset.moved(term, new.given, places)
    return placed, read_by(placed, {**new.given, **seen.rows, **given})


@advance.register
def _(term: Latent, state: None, new: NewTokens) -> tuple[Outcome, None]:
    """The absorbed form: all heads read the cached row, and values are part of it."""
    if new.first:
        return attend(term, new.inputs, new.of(term), new.setting), state
    q, k, _ = new.inputs
    turned, back, rank = absorbed_form(term, new.given, (q, k))
    part = replace(term.softmax, values=(0, rank))
    own = replace(new, inputs=(turned, k, k), seen=_without_values(new.seen))
    found, state = advance(part, state, own)
    return Outcome(back(found.out), found.lse), state


def _without_values(seen: Seen | None) -> Seen | None:
    """The cached keys, whose channels are the values too."""
    if seen is None:
        return None
    return seen._replace(rows={n: x for n, x in seen.rows.items() if n != V})


@advance.register
def _(term: Over, state: None, new: NewTokens) -> tuple[Outcome, None]:
    """Softmax over entries that the caller keeps."""
    if new.first:
        return attend(term, new.inputs, new.of(term), new.setting), state
    placed = replace(term, map=traced_offset.moved_map(term.map, new.given))
    given = read_by(placed, {**new.given, OFFSET: new.count})
    return attend(placed, new.inputs, given, new.setting), state


@advance.register
def _(term: Weighted, state: Any, new: NewTokens) -> tuple[Outcome, Any]:
    found, state = advance(term.term, state, new)
    return weighed(found, term.log_weight), state


@advance.register
def _(term: Joint, state: tuple, new: NewTokens) -> tuple[Outcome, tuple]:
    """One softmax over all parts, whose pairs are disjoint."""
    found, states = _parts(term.terms, state, new)
    return found[0] if len(found) == 1 else merging.merge(found), states


@advance.register
def _(term: Average, state: tuple, new: NewTokens) -> tuple[Outcome, tuple]:
    found, states = _parts(term.terms, state, new)
    return Outcome(merging.mean(tuple(x.out for x in found)), None), states


@advance.register
def _(term: Gated, state: tuple, new: NewTokens) -> tuple[Outcome, tuple]:
    gates = gates_of(term, new.given, new.inputs[0])
    found, states = _parts(term.terms, state, new)
    outputs = tuple(x.out for x in found)
    return Outcome(merging.gated_sum(outputs, gates), None), states


@advance.register
def _(term: Heads, state: tuple, new: NewTokens) -> tuple[Outcome, tuple]:
    """Each part on its own heads."""
    seen, found, states = new.seen, [], []
    for i, ((q, k, v), part) in enumerate(slices(new.inputs, term)):
        own = replace(new, inputs=(q, k, v), seen=_of_heads(seen, i, new, term))
        outcome, after = advance(part, state[i], own)
        found.append(outcome)
        states.append(after)
    return merging.beside(found), tuple(states)


def _of_heads(seen: Seen | None, part: int, new: NewTokens, term: Heads) -> Seen | None:
    """The cached keys of one part of ``heads``."""
    if seen is None:
        return None
    q, k, _ = new.inputs
    group = q.shape[2] // k.shape[2]
    counts = [n for _, n in term.shares]
    start = sum(counts[:part]) // group
    stop = start + counts[part] // group
    own = {n: x[:, start:stop] for n, x in seen.rows.items() if n in (K, V)}
    return seen._replace(rows={**seen.rows, **own})


def _parts(
    terms: tuple[Spec, ...], state: tuple, new: NewTokens
) -> tuple[list[Outcome], tuple]:
    each = [advance(part, x, new) for part, x in zip(terms, state, strict=True)]
    return [found for found, _ in each], tuple(after for _, after in each)
