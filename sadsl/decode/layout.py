"""What a cache of a spec must hold, from the expressions of its maps."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lowering import ir
from lowering.bias import nodes
from lowering.expr.assume import envelope
from sadsl.analysis.cache import cache_of, length_note, ring
from sadsl.decode.slots import CacheSlots
from sadsl.maps.base import IndexMap
from sadsl.selections.base import selections_of, widest
from sadsl.terms.base import Spec, Term
from sadsl.terms.biases import Bias
from sadsl.terms.compressed import Compressed
from sadsl.terms.heads import Heads
from sadsl.terms.over import Over
from sadsl.terms.recurrent import Recurrent
from sadsl.terms.softmax import Softmax
from sadsl.terms.summaries import Summaries


@dataclass(frozen=True)
class CacheLayout:
    """The static part of a cache.

    Attributes:
      term: the spec.
      max_len: the most tokens.
      num_heads: query heads.
      slots: where the keys of tokens lie; None if no part keeps keys.
      axes: the arrays with an entry for each key that are kept as keys are, and the
        axis of their keys, without the batch axis.
    """

    term: Term
    max_len: int
    num_heads: int
    slots: CacheSlots | None
    axes: tuple[tuple[str, int], ...]


def of_one_length(maps: Iterable[IndexMap]) -> bool:
    """Whether some map is made for the whole length, as those on grids are."""
    every = (part for each in maps for part in ir.walk(each.node))
    return any(isinstance(x, ir.Within) or x == ir.Var("n") for x in every)


def token_maps(spec: Spec, num_heads: int) -> Iterator[tuple[IndexMap, int]]:
    """The maps of the parts that keep the keys of tokens, and their heads."""
    if isinstance(spec, IndexMap):
        yield spec, num_heads
    elif isinstance(spec, Heads):
        for part, count in spec.shares:
            yield from token_maps(part, count)
    elif not isinstance(spec, Recurrent | Over | Compressed | Summaries):
        for part in spec.parts:
            yield from token_maps(part, num_heads)


@lru_cache(maxsize=256)
def slots_of(
    maps: tuple[tuple[IndexMap, int], ...], max_len: int, *, in_order: bool
) -> CacheSlots:
    """The slots that all of the maps need; one for each position if ``in_order``.

    Raises:
      ValueError: a map is not causal, or is made for another length.
      NotImplementedError: the keys of a query depend on how many tokens follow.
    """
    last_use = []
    for part, num_heads in maps:
        _check_length(part, max_len, num_heads)
        every = envelope(widest(part), lambda _: True)
        last_use.append(cache_of(every, max_len, num_heads).last_use)
    pinned, slots = ring(np.max(last_use, axis=0))
    if in_order or pinned + slots >= max_len:
        return CacheSlots(0, max_len, max_len)
    return CacheSlots(pinned, slots, max_len)


def _check_length(map: IndexMap, max_len: int, num_heads: int) -> None:
    node = envelope(widest(map), lambda _: True)
    note = length_note(node, max_len, num_heads)
    grid = any(isinstance(part, ir.Within) for part in ir.walk(node))
    if note is not None and not grid:
        raise NotImplementedError(
            f"decoding {map!r}: the map depends on the length: {note}"
        )


def reads_in_order(term: Term) -> bool:
    """Whether keys must lie in the order of positions.

    Choices compare keys in that order, and running sums add them up.
    """
    running = any(name in _running(term) for name in by_key(term))
    return running or any(not choice.by_token for choice in selections_of(term))


def _running(term: Any) -> set[str]:
    """The arrays of which a bias takes running sums."""
    return {x.name for x in weights_of(term) if x.running is not None}


def weights_of(term: Any) -> Iterator[nodes.Weights]:
    """The look-ups of floats in the biases and scales of a spec."""
    if isinstance(term, Softmax):
        for part in (term.bias, term.scale):
            if part is not None:
                yield from nodes.weights(part.score(1))
    if isinstance(term, Term):
        for part in term.parts:
            yield from weights_of(part)


def by_key(value: Any) -> dict[str, int]:
    """The arrays that the maps and biases of a spec index by the key, and that axis."""
    found: dict[str, int] = {}
    for name, index in _looked_up(value):
        if ir.K in index:
            found[name] = index.index(ir.K)
    return found


def ranks_of(term: Term) -> dict[str, int]:
    """The numbers of axes, without the batch, of the arrays that a spec reads."""
    found = {n: r for s in selections_of(term) for n, r in s.operands.items()}
    return found | {name: len(index) for name, index in _looked_up(term)}


def by_query(value: Any) -> set[str]:
    """The arrays that the maps and biases of a spec index by the query."""
    return {name for name, index in _looked_up(value) if ir.Q in index}


def _looked_up(value: Any) -> Iterator[tuple[str, tuple[ir.Expr, ...]]]:
    """The run-time arrays of a spec with their indices.

    Those of choices are left out, unless their parts belong to tokens.
    """
    if isinstance(value, IndexMap):
        chosen = [s for s in selections_of(value) if not s.by_token]
        for part in ir.walk(value.node):
            if not isinstance(part, ir.Operand):
                continue
            if not any(s.owns(part.name) for s in chosen):
                yield part.name, part.index
    elif isinstance(value, Bias):
        score = value.score(1)
        for part in (*nodes.weights(score), *nodes.integer_operands(score)):
            yield part.name, part.index
    elif isinstance(value, tuple):
        for part in value:
            yield from _looked_up(part)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _looked_up(getattr(value, each.name))
