"""Finds the pairs that terms of a joint share, and takes them out of later terms."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from itertools import combinations, product
from operator import or_
from typing import Literal, NamedTuple

import numpy as np

from lowering import ir, pipeline
from lowering.expr.assume import envelope
from lowering.expr.evaluate import NumPy, evaluate
from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.maps.named import full
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec, Term
from sadsl.terms.softmax import Softmax

# The block size for comparing plans, close to that of the kernels.
BLOCK = 128
NOWHERE = ~full()
Meeting = Literal["never", "unknown"] | tuple[int, int, int]


class Member(NamedTuple):
    """A term of a joint, with its weight and its dropout.

    Attributes:
      term: the term; a softmax has no sink here.
      log_weight: the number added to its lse.
      draw: the number of its dropout draw. Members with the same number share no pair.
        None if it needs a number of its own.
      counts: whether it keeps the pairs that it shares with others of its unit.
    """

    term: Spec
    log_weight: float = 0.0
    draw: int | None = 0
    counts: bool = False


# Members of one unit keep the pairs that they share. A pair that two units share
# belongs to the first of them.
Unit = tuple[Member, ...]


def settled(units: Sequence[Unit], problem: Problem) -> tuple[Member, ...]:
    """The members to merge by log-sum-exp, without pairs that two units share.

    Raises:
      ValueError: a pair is in two units, and the later one cannot give it up.
    """
    return _grouped(_disjoint(units, problem), problem)


class _Own(NamedTuple):
    """A member without the pairs of the members before it.

    ``beside`` is its map without those of members with other options only: several
    members of equal options can run as one softmax over the union of their ``beside``.
    """

    member: Member
    beside: IndexMap


def _disjoint(units: Sequence[Unit], problem: Problem) -> list[_Own]:
    """The members of all units without shared pairs; empty ones are dropped."""
    kept: list[_Own] = []
    for unit in units:
        before = [own.member for own in kept]
        for member in unit:
            own = _without(member, before, problem)
            both = support(own.member.term), support(member.term)
            other_keys = isinstance(member.term, Term) and not member.term.of_tokens
            if member.counts or other_keys or meeting(*both, problem) != "never":
                kept.append(own)
    # If no pair is left, one empty member yields the output 0.
    return kept or [_Own(units[0][0], support(units[0][0].term))]


def _without(member: Member, before: Sequence[Member], problem: Problem) -> _Own:
    """Takes the pairs of the members before it out of a member.

    Raises:
      ValueError: it is not a softmax, so it cannot give up single pairs.
    """
    term = member.term
    met = [x for x in before if _meet(x.term, term, problem)]
    if met and not isinstance(term, Softmax):
        raise ValueError(
            f"joint: {term!r} shares pairs with {met[0].term!r}, which comes before "
            "it, and cannot give up single pairs: put it first, so that the other "
            "gives them up, take them out of the other by hand, or say "
            "overlap='count' to count them twice"
        )
    if not met or not isinstance(term, Softmax):
        return _Own(member, support(term))
    options = _options(member)
    others = [x for x in met if _options(x) != options]
    less = replace(term, map=_minus(term.map, met))
    return _Own(member._replace(term=less), _minus(term.map, others))


def _minus(map: IndexMap, others: Sequence[Member]) -> IndexMap:
    return map - union([support(x.term) for x in others]) if others else map


def _options(member: Member) -> Member | None:
    """The options of a softmax member: itself with an empty map.

    None for members that cannot be joined with others.
    """
    if member.counts or not isinstance(member.term, Softmax):
        return None
    return member._replace(term=replace(member.term, map=NOWHERE))


def _meet(a: Spec, b: Spec, problem: Problem) -> bool:
    return meeting(support(a), support(b), problem) != "never"


def check_disjoint(parts: Sequence[Sequence[Member]], problem: Problem) -> None:
    """Refuses parts of a joint that share a pair.

    Raises:
      ValueError: two parts share a pair, or content decides whether they do.
    """
    for one, other in combinations(parts, 2):
        for a, b in product(one, other):
            found = meeting(support(a.term), support(b.term), problem)
            if found == "never":
                continue
            where = "content decides whether they share a pair"
            if found != "unknown":
                head, query, key = found
                where = f"query {query} and key {key} of head {head} are in both"
            raise ValueError(
                f"joint: overlap='refuse', but {where}: {a.term!r} and {b.term!r}; use "
                "overlap='remove', or maps that are disjoint"
            )


def _grouped(owned: Sequence[_Own], problem: Problem) -> tuple[Member, ...]:
    """Joins softmax members of equal options, if that visits no more blocks."""
    groups: dict[Member | int, list[_Own]] = {}
    for i, own in enumerate(owned):
        options = _options(own.member)
        groups.setdefault(i if options is None else options, []).append(own)
    found: list[Member] = []
    for group in groups.values():
        first, members = group[0].member, [own.member for own in group]
        if len(group) > 1 and isinstance(first.term, Softmax):
            whole = replace(first.term, map=union([own.beside for own in group]))
            if _costs_no_more(whole, members, problem):
                members = [first._replace(term=whole)]
        found += members
    return tuple(found)


def union(maps: Sequence[IndexMap]) -> IndexMap:
    """The union of maps; the empty map if there are none."""
    return reduce(or_, maps) if maps else NOWHERE


def _costs_no_more(whole: Softmax, members: Sequence[Member], problem: Problem) -> bool:
    """Whether one plan visits no more blocks than the plans of the members together."""
    maps = [support(x.term) for x in members]
    chosen = [s for map in maps for s in selections_of(map)]
    if chosen:
        # Alone, a map with labels may be sorted by them at run time, which saves more.
        return not any(s.order for s in chosen)
    return _visited(whole.map, problem) <= sum(_visited(m, problem) for m in maps)


@lru_cache(maxsize=512)
def _visited(map: IndexMap, problem: Problem) -> int:
    """The number of blocks that the plan of a map visits, over all heads."""
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
    """A pair ``(head, query, key)`` of both maps.

    "never" if they share none, "unknown" if run-time arrays decide it.
    """
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
    """ "never" if two maps share no pair for any run-time arrays, else "unknown"."""
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
    """The first pair ``(query, key)`` of a block, or None."""
    q = np.arange(q_block * BLOCK, min((q_block + 1) * BLOCK, problem.q_seq_len))
    k = np.arange(kv_block * BLOCK, min((kv_block + 1) * BLOCK, problem.kv_seq_len))
    held = evaluate(node, NumPy(q[:, None], k[None, :]))
    at = np.argwhere(np.broadcast_to(held, (len(q), len(k))))
    return (int(q[at[0, 0]]), int(k[at[0, 1]])) if len(at) else None
