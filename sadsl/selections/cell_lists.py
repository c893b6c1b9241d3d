"""Chooses the best cells of each row of queries as a list, a strip of rows at a time.

The bits of a choice take memory for each query and each cell; a list only for the cells
that are chosen. Scores exist for one strip of rows at a time.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowering import ir, pipeline
from lowering.problem import Problem
from pallas_kernels.lists.call import num_blocks
from sadsl.maps.base import IndexMap
from sadsl.selections.base import Content
from sadsl.selections.cell_scores import CellSides, Score, cell_sides, scorer
from sadsl.selections.dot_scores import Dot, DotArrays, arrays_of, dot_scores
from sadsl.selections.listing import largest
from sadsl.selections.static_cells import held_at, of_heads, pairs_at

# Rows of a strip, and rows from which on a choice is split into parts with their own
# ranges of keys: in a causal map, early queries score few keys.
STRIP = 16
PART, MOST_PARTS = 2048, 4
# Plans of eligible maps are made in blocks of so many keys.
BLOCK = 128


class Budget(NamedTuple):
    """Which cells are listed."""

    size: int  # cells in a list
    block_q: int  # queries in a row
    block: int  # keys in a cell
    eligible: IndexMap | None
    forced: IndexMap | None

    def masks(self) -> tuple[IndexMap, ...]:
        """The maps that limit the choice."""
        return tuple(a for a in (self.eligible, self.forced) if a is not None)


def may_list(budget: Budget, problem: Problem) -> bool:
    """Whether lists of this size hold all that the budget keeps.

    Maps that differ by head need a list for each head, and more forced cells than
    ``size`` do not fit a list.
    """
    if any(ir.axes(a.node) & {"h"} or _has_heads(a.node) for a in budget.masks()):
        return False
    if budget.forced is None:
        return True
    return _most_cells(budget.forced, budget, problem) <= budget.size


def _has_heads(node: ir.Pred) -> bool:
    return any(isinstance(n, ir.ByHead) for n in ir.walk(node))


def _most_cells(a: IndexMap, budget: Budget, problem: Problem) -> int:
    """The most cells of one row that hold a pair of ``a``, wherever queries begin."""
    keys, end = problem.kv_seq_len, problem.q_offset + problem.q_seq_len
    stages = pipeline.run(a.node, Problem(max(end, keys), keys, problem.num_heads))
    mask = pipeline.block_mask(stages, budget.block_q, budget.block, "q")
    length = np.asarray(mask.run_stop) - np.asarray(mask.run_start)
    total = np.concatenate([[0], np.cumsum(length)])
    rows = total[np.asarray(mask.row_ptr)]
    return int(np.diff(rows).max(initial=0))


class Part(NamedTuple):
    """Some rows, and the cells that some query of them may choose."""

    first: int
    stop: int
    first_cell: int
    stop_cell: int


def parts_of(budget: Budget, sides: CellSides) -> list[Part]:
    """Divides the rows, so that each part scores the cells of its own range only."""
    problem = sides.problem
    rows = num_blocks(sides.num_queries, budget.block_q)
    cells = num_blocks(problem.kv_seq_len, budget.block)
    count = max(1, min(MOST_PARTS, rows * budget.block_q // PART))
    each = -(-rows // count)
    whole = [Part(i, min(i + each, rows), 0, cells) for i in range(0, rows, each)]
    if budget.eligible is None or not isinstance(sides.first, int):
        return whole
    stages = pipeline.run(budget.eligible.node, problem)
    mask = pipeline.block_mask(stages, each * budget.block_q, BLOCK, "q")
    ptr = np.asarray(mask.row_ptr)
    found = []
    for i, part in enumerate(whole):
        runs = slice(ptr[i], ptr[i + 1])
        start = np.asarray(mask.run_start[runs]).min(initial=cells * budget.block)
        stop = np.asarray(mask.run_stop[runs]).max(initial=0)
        first = min(int(start) * BLOCK // budget.block, cells - 1)
        last = min(num_blocks(int(stop) * BLOCK, budget.block), cells)
        found.append(part._replace(first_cell=first, stop_cell=max(last, first + 1)))
    return found


# The scores of some rows and a range of cells: [batch, choices, rows, cells].
StripScores = Callable[[Int[Array, " rows"], Part], Float[Array, "b c r cells"]]


def lists(
    budget: Budget, score: Score, content: Content, heads: int
) -> Int[Array, "batch choices rows cells"]:
    """The best cells of each row and choice, ascending; then the number of all cells.

    ``heads`` query heads make one choice.
    """
    sides = cell_sides(budget.block_q, budget.block, content)
    of_strip = _strip_scores(budget, score, content, heads)
    found = [
        _of_part(part, budget, sides, of_strip) for part in parts_of(budget, sides)
    ]
    return jnp.concatenate(found, axis=2)


def _of_part(
    part: Part, budget: Budget, sides: CellSides, of_strip: StripScores
) -> Int[Array, "batch choices rows cells"]:
    rows = part.stop - part.first
    strip = min(STRIP, rows)
    count = -(-rows // strip)
    cells = num_blocks(sides.problem.kv_seq_len, budget.block)
    chooses = part.stop_cell - part.first_cell > budget.size

    def of(start: Int[Array, ""]) -> Int[Array, "batch choices rows cells"]:
        row = jnp.minimum(start + jnp.arange(strip, dtype=jnp.int32), part.stop - 1)
        eligible, forced = (
            _holding(a, row, part, budget, sides)
            for a in (budget.eligible, budget.forced)
        )
        # Where a list holds all cells, no score is needed.
        scores = of_strip(row, part) if chooses else jnp.zeros((1, 1, strip, 1))
        if forced is not None:
            scores = jnp.where(forced, jnp.inf, scores)
        width = part.stop_cell - part.first_cell
        scores = jnp.broadcast_to(scores, (*scores.shape[:3], width))
        if eligible is not None:
            scores = jnp.where(eligible, scores, -jnp.inf)
        found = largest(scores.reshape(-1, width), budget.size)
        found = jnp.where(found < width, found + part.first_cell, cells)
        return found.reshape(*scores.shape[:3], budget.size)

    starts = part.first + strip * jnp.arange(count, dtype=jnp.int32)
    found = jax.lax.map(of, starts)
    found = jnp.moveaxis(found, 0, 2)
    return found.reshape(*found.shape[:2], -1, budget.size)[:, :, :rows]


def _holding(
    a: IndexMap | None, row: Array, part: Part, budget: Budget, sides: CellSides
) -> Bool[Array, "1 1 rows cells"] | None:
    """Which cells of a strip hold a pair of ``a``; None if all do."""
    if a is None:
        return None
    sizes = budget.block_q, budget.block
    columns = part.first_cell, part.stop_cell
    if not isinstance(sides.first, int):
        row = row + sides.first  # rows of one query
    return held_at(a, row, sizes, columns, _one_head(sides.problem))[None]


def _one_head(problem: Problem) -> Problem:
    """The problem of one head: lists are only for maps that no head changes."""
    return replace(problem, num_heads=1)


def _below(size: int) -> Int[Array, " size"]:
    return jnp.arange(size, dtype=jnp.int32)


def _strip_scores(
    budget: Budget, score: Score, content: Content, heads: int
) -> StripScores:
    num_heads = content.q.shape[1]
    if isinstance(score.by, Dot):
        cells = num_blocks(content.k.shape[2], budget.block)
        arrays = arrays_of(score.by, content, num_heads // heads, cells)
        return lambda row, part: _dot_strip(
            row, part, budget, score.by, arrays, content
        )
    sides = cell_sides(budget.block_q, budget.block, content)
    choices = num_heads // heads
    query, of_rows, _ = scorer(score, content, sides, budget.eligible, choices)

    def of(row: Array, part: Part) -> Float[Array, "batch choices rows cells"]:
        own = jax.tree.map(lambda x: x[:, :, row], query)
        found = of_rows(own)[..., part.first_cell : part.stop_cell]
        found = found.reshape(len(found), -1, heads, *found.shape[2:]).mean(axis=2)
        # Cells whose score is NaN or infinite are never chosen.
        return jnp.where(jnp.isfinite(found), found, -jnp.inf)

    return of


def _dot_strip(
    row: Array, part: Part, budget: Budget, score: Dot, arrays: DotArrays,
    content: Content,
) -> Float[Array, "batch choices rows cells"]:  # fmt: skip
    """The scores of ``dot``; of several pairs, the greatest eligible one."""
    length, kv_seq_len = content.q.shape[2], content.k.shape[2]
    at = row[:, None] * budget.block_q + _below(budget.block_q)[None]
    at = jnp.minimum(at, length - 1).reshape(-1)
    weights = None if arrays.weights is None else arrays.weights[:, :, at]
    of_cells = arrays.k.shape[3] != kv_seq_len or budget.block == 1
    size = 1 if of_cells else budget.block
    keys = slice(part.first_cell * size, part.stop_cell * size)
    own = DotArrays(arrays.q[:, :, at], weights, arrays.k[..., keys, :])
    found = dot_scores(score, own)
    found = found.reshape(*found.shape[:2], len(row), budget.block_q, -1)
    if of_cells:
        return found.max(axis=3)
    spare = (part.stop_cell - part.first_cell) * size - found.shape[-1]
    found = jnp.pad(found, [(0, 0)] * 4 + [(0, spare)], constant_values=-jnp.inf)
    if budget.eligible is not None:
        sides = cell_sides(budget.block_q, budget.block, content)
        problem = _one_head(sides.problem)
        (node,) = of_heads(budget.eligible, problem)
        q = at.reshape(len(row), -1, 1) + sides.first
        key = np.minimum(np.arange(found.shape[-1]) + keys.start, kv_seq_len - 1)
        (held,) = pairs_at((node,), q, jnp.asarray(key, jnp.int32)[None, None], problem)
        found = jnp.where(held[None, None], found, -jnp.inf)
    found = found.max(axis=3)
    return found.reshape(*found.shape[:3], -1, size).max(axis=4)
