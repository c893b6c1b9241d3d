"""Which pairs two terms of a joint share, and who keeps them: by the expressions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from operator import or_
from typing import Any, Literal, NamedTuple

import numpy as np

from lowering import ir, pipeline
from lowering.envelope import envelope
from lowering.pipeline import Problem
from lowering.predicate import NumPy, evaluate
from sadsl.maps import IndexMap
from sadsl.named import full
from sadsl.selections.content import selections_of
from sadsl.term import Spec, Term
from sadsl.terms import Softmax

# Blocks that plans are compared with: about those of the kernels.
BLOCK = 128
NOWHERE = ~full()
Meeting = Literal["never", "unknown"] | tuple[int, int, int]


def one_softmax(term: Spec) -> Softmax | None:
    """The one softmax that a joint of maps with equal options means, if it is one."""
    if isinstance(term, IndexMap):
        return Softmax(term)
    if isinstance(term, Softmax):
        return term
    if getattr(term, "overlap", "count") == "count":
        return None
    parts = [one_softmax(part) for part in term.parts]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({_options(part) for part in known}) > 1:
        return None
    return replace(known[0], map=union([part.map for part in known]))


def resolve(terms: Sequence[Spec], overlap: str, problem: Problem) -> tuple[Spec, ...]:
    """The terms to be merged by log-sum-exp, as ``sadsl.joint`` describes them.

    Raises:
      ValueError: a pair is in two terms that cannot or shall not give it up.
    """
    flat = tuple(x for term in terms for x in _flat(term, overlap, problem))
    if overlap == "count":
        return flat
    if overlap == "refuse":
        _check_disjoint(flat, problem)
    return _grouped(_disjoint(flat, problem), problem)


def _flat(term: Spec, overlap: str, problem: Problem) -> tuple[Spec, ...]:
    """The parts of a joint in a joint, and a map as the softmax that it means."""
    if isinstance(term, IndexMap):
        return (Softmax(term),)
    inner = getattr(term, "overlap", None)
    if inner is None:
        return (term,)
    assert isinstance(term, Term)
    if inner == overlap:
        return tuple(x for part in term.parts for x in _flat(part, overlap, problem))
    return resolve(term.parts, inner, problem)


class _Own(NamedTuple):
    """A term without the pairs of those before it.

    ``beside`` still has those that terms of equal options have too.
    """

    term: Spec
    beside: Spec


def _disjoint(terms: Sequence[Spec], problem: Problem) -> list[_Own]:
    kept: list[_Own] = []
    for term in terms:
        mine = support(term)
        met = [x.term for x in kept if _meet(x.term, term, problem)]
        if met and not isinstance(term, Softmax):
            raise ValueError(
                f"joint: {term!r} shares pairs with {met[0]!r}, which comes before it, "
                "and cannot give up single pairs: put it first, so that the other "
                "gives them up, take them out of the other by hand, or say "
                "overlap='count' to have both"
            )
        own = _Own(term, term)
        if met and isinstance(term, Softmax):
            others = [x for x in met if _options(x) != _options(term)]
            own = _Own(_without(term, met), _without(term, others))
        if meeting(support(own.term), mine, problem) != "never":
            kept.append(own)
    # A joint of nothing still has its output of 0.
    return kept or [_Own(terms[0], terms[0])]


def _meet(a: Spec, b: Spec, problem: Problem) -> bool:
    return meeting(support(a), support(b), problem) != "never"


def _without(term: Softmax, others: Sequence[Spec]) -> Softmax:
    if not others:
        return term
    return replace(term, map=term.map - union([support(x) for x in others]))


def _options(term: Spec) -> Spec | None:
    """What a softmax is but for its map; None for another term."""
    return replace(term, map=NOWHERE) if isinstance(term, Softmax) else None


def _check_disjoint(terms: Sequence[Spec], problem: Problem) -> None:
    for i, a in enumerate(terms):
        for b in terms[i + 1 :]:
            found = meeting(support(a), support(b), problem)
            if found == "never":
                continue
            where = "content decides whether they share a pair"
            if found != "unknown":
                head, query, key = found
                where = f"query {query} and key {key} of head {head} are in both"
            raise ValueError(
                f"joint: overlap='refuse', but {where}: {a!r} and {b!r}; use "
                "overlap='remove', or maps that are disjoint"
            )


def _grouped(terms: Sequence[_Own], problem: Problem) -> tuple[Spec, ...]:
    """Softmax terms of equal options as one, where that visits no more blocks."""
    groups: dict[Any, list[_Own]] = {}
    for own in terms:
        key = _options(own.term)
        groups.setdefault(own.term if key is None else key, []).append(own)
    found: list[Spec] = []
    for options, group in groups.items():
        parts = [x.term for x in group]
        if len(group) > 1:
            whole = replace(options, map=union([support(x.beside) for x in group]))
            # A sink is one of all of them, not one each.
            if options.sink is not None or _costs_no_more(whole, parts, problem):
                parts = [whole]
        found += parts
    return tuple(found)


def union(maps: Sequence[IndexMap]) -> IndexMap:
    """The union of maps; of none, the map of no pair."""
    return reduce(or_, maps) if maps else NOWHERE


def _costs_no_more(whole: Softmax, parts: Sequence[Spec], problem: Problem) -> bool:
    """Whether one plan visits no more blocks than those of the parts together."""
    maps = [support(part) for part in parts]
    chosen = [s for map in maps for s in selections_of(map)]
    if chosen:
        # A map that content decides may be sorted by its labels, if it stands alone.
        return not any(s.order for s in chosen)
    return _visited(whole.map, problem) <= sum(_visited(m, problem) for m in maps)


@lru_cache(maxsize=512)
def _visited(map: IndexMap, problem: Problem) -> int:
    stages = pipeline.arrange(pipeline.run(map.node, problem), BLOCK, BLOCK)
    mask = pipeline.block_mask(stages, BLOCK, BLOCK, "q")
    heads = np.bincount(mask.map_of_head, minlength=mask.num_maps)
    length = np.asarray(mask.run_stop) - np.asarray(mask.run_start)
    before = np.concatenate([[0], np.cumsum(length)])
    rows = before[mask.row_ptr[1:]] - before[mask.row_ptr[:-1]]
    return int((rows.reshape(mask.num_maps, -1).sum(axis=1) * heads).sum())


def support(term: Spec) -> IndexMap:
    """The pairs of a term of a joint."""
    found = term.support if isinstance(term, Term) else term
    assert found is not None
    return found


@lru_cache(maxsize=1024)
def meeting(a: IndexMap, b: IndexMap, problem: Problem) -> Meeting:
    """A pair ``(head, query, key)`` of both maps; or that there is none, or unknown."""
    both = a if a == b else a & b
    stages = pipeline.run(both.node, problem)
    program = stages["simplify"]
    if all(node == ir.Bool(False) for node in program.maps):
        return "never"
    if any(ir.operand_names(node) for node in program.maps):
        return _meeting_at_run_time(program, problem)
    mask = pipeline.block_mask(stages, BLOCK, BLOCK, "q", True)
    for run in range(len(mask.run_start)):
        row = int(np.searchsorted(mask.row_ptr, run, side="right")) - 1
        which, block = divmod(row, mask.num_rows)
        found = _pair(program.maps[which], block, int(mask.run_start[run]), problem)
        if found is not None:
            head = program.map_of_head.index(which)
            return head, found[0] + problem.q_offset, found[1]
    return "never"


def _meeting_at_run_time(program: pipeline.Program, problem: Problem) -> Meeting:
    """ "never" if two maps are disjoint whatever the run-time arrays hold."""
    for node in program.maps:
        widest = envelope(node, lambda _: True)
        one = replace(problem, num_heads=1)
        stages = pipeline.run(widest, one)
        mask = pipeline.block_mask(stages, BLOCK, BLOCK, "q", True)
        if len(mask.run_start):
            return "unknown"
    return "never"


def _pair(
    node: ir.Pred, q_block: int, kv_block: int, problem: Problem
) -> tuple[int, int] | None:
    """The first pair of a block, if it has one."""
    q = np.arange(q_block * BLOCK, min((q_block + 1) * BLOCK, problem.q_seq_len))
    k = np.arange(kv_block * BLOCK, min((kv_block + 1) * BLOCK, problem.kv_seq_len))
    held = evaluate(node, NumPy(q[:, None], k[None, :]))
    at = np.argwhere(np.broadcast_to(held, (len(q), len(k))))
    return (int(q[at[0, 0]]), int(k[at[0, 1]])) if len(at) else None
