"""Scores cells of queries and keys, for the selections that keep the best of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.selections.attended import Attended
from sadsl.selections.base import Content
from sadsl.selections.dot_scores import Dot, DotArrays, arrays_of, dot_scores
from sadsl.selections.static_cells import of_heads, pairs_at
from sadsl.selections.tiles import Partition, grouped, pooled, positions

POOLED = ("mean", "min_max")
EVERY_PAIR = ("max", "attention")
NORMALISE = ("none", "softmax", "whole_softmax", "minmax")
# The number of scores, or of pairs, that are in memory at a time.
LIMIT = 1 << 18
# A traced position is below this.
LAST_POSITION = 1 << 30


@dataclass(frozen=True, repr=False)
class Score:
    """How cells are scored; made by ``scored``."""

    by: str | Dot | Attended
    normalise: str = "none"
    scale: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            check_operand_name("score", self.by, *map(repr, (*POOLED, *EVERY_PAIR)))
        elif not isinstance(self.by, Dot | Attended):
            raise TypeError(
                f"score: {self.by!r} must be a name, dot(...) or attended(...)"
            )
        if self.normalise not in NORMALISE:
            raise ValueError(
                f"scored: normalise={self.normalise!r} must be one of {NORMALISE}"
            )

    def __repr__(self) -> str:
        plain = self == Score(self.by)
        return repr(self.by) if plain else call_text(self, "scored")

    @property
    def is_operand(self) -> bool:
        """Whether the scores are an operand of the call."""
        return isinstance(self.by, str) and self.by not in (*POOLED, *EVERY_PAIR)

    @property
    def operands(self) -> Mapping[str, int]:
        """The operands that it reads, with their numbers of axes beside the batch."""
        if isinstance(self.by, Dot | Attended):
            return self.by.operands
        return {self.by: 3} if self.is_operand else {}


MEAN = Score("mean")


def scored(
    by: str | Dot | Attended, *, normalise: str = "none", scale: float | None = None
) -> Score:
    """How ``topk``, ``threshold`` and ``mass`` score cells.

    Args:
      by: "mean": the product of the mean query and the mean key of the cell.
        "min_max": the upper bound ``sum_d max(q_d * min_d, q_d * max_d)`` of the
        product of the mean query with any key of the cell (Tang et al., Quest, 2024,
        section 3.3). "max": the largest logit of the pairs of the cell. "attention":
        the softmax weight of the cell, over all eligible keys, averaged over its
        queries. ``dot(...)``: products of arrays made for it. Any other name is an
        operand that holds the scores, floats ``[heads, rows, columns]`` with query
        heads, key heads or one head. "max", "attention" and ``dot`` compute every pair,
        a few rows at a time.
      normalise: how the scores of the cells that share a budget (a row, unless
        ``scope`` says otherwise) are normalised. "softmax": over the eligible cells;
        "whole_softmax": over the cells without an ineligible pair, others get 0;
        "minmax": linearly from 0 to 1 over the eligible cells; "none": not at all.
      scale: the factor of the logits; ``sm_scale`` of the call if None. It does not
        apply to an operand, nor to ``dot``, which has its own.

    Raises:
      ValueError: ``by`` is not a name, or ``normalise`` is not one of these.

    Example:
      >>> import sadsl as sa
      >>> sa.topk(2, score=scored("mean", normalise="softmax"))
      topk(2, score=scored('mean', normalise='softmax'))
    """
    return Score(by, normalise, scale)


Rows = Callable[[Any], Float[Array, "batch heads rows columns"]]


@dataclass(frozen=True)
class CellSides:
    """How the queries and the keys of a call are divided into rows and columns.

    ``first`` is the position of the first of ``num_queries`` queries. If it is traced,
    ``problem`` has all positions that it may have.
    """

    rows: Partition
    columns: Partition
    problem: Problem
    first: Any
    num_queries: int


def cell_sides(rows: Partition, columns: Partition, content: Content) -> CellSides:
    """The sides of the cells of a call."""
    queries, keys = content.q.shape[2], content.k.shape[2]
    heads, offset = content.q.shape[1], content.q_offset
    if content.position is None:
        problem = Problem(queries, keys, heads, offset)
        return CellSides(rows, columns, problem, offset, queries)
    problem = Problem(LAST_POSITION, keys, heads)
    return CellSides(rows, columns, problem, content.first, queries)


def scorer(
    score: Score,
    content: Content,
    sides: CellSides,
    eligible: IndexMap | None,
    num_choices: int,
) -> tuple[Any, Rows, int]:
    """The inputs of the scores, the function that computes them, and its cost.

    The scores have the query heads; those of ``dot`` have ``num_choices`` heads.

    Returns:
      A tree of arrays ``[batch or 1, heads or 1, rows, ...]``; a function that takes
      some rows of the tree; the numbers that the function holds in memory for a row.

    Raises:
      ValueError: an operand does not have the shape of the cells.
    """
    batch, num_heads = content.q.shape[:2]
    columns = len(positions(sides.columns, content.k.shape[2])[0])
    if isinstance(score.by, Dot):
        arrays = arrays_of(score.by, content, num_choices, columns)
        return _dot_scorer(score.by, arrays, sides, eligible)
    if score.is_operand:
        assert isinstance(score.by, str)
        given = _given(score.by, content, sides)
        return given, lambda x: x, batch * num_heads * columns
    scale = content.sm_scale if score.scale is None else score.scale
    # A traced scale may be of float64; scores are of float32.
    scale = scale if isinstance(scale, float) else jnp.asarray(scale, jnp.float32)
    if isinstance(score.by, Attended):
        return _attended_scorer(score.by, content, sides, scale)
    if score.by in POOLED:
        of_rows = _pooled_scorer(score.by, content, sides.columns, scale)
        means = pooled(content.q, sides.rows, "mean")
        return means, of_rows, batch * num_heads * columns
    at, real = positions(sides.rows, content.q.shape[2])
    query = {
        "q": grouped(content.q.astype(jnp.float32), sides.rows, -2)[0],
        "at": jnp.asarray(at, jnp.int32)[None, None],
        "real": jnp.asarray(real)[None, None],
    }
    cost = batch * num_heads * at.shape[1] * content.k.shape[2]
    of_rows = _pair_scorer(score.by, content, sides, (scale, eligible))
    return query, of_rows, cost


def _given(
    name: str, content: Content, sides: CellSides
) -> Float[Array, "batch heads rows columns"]:
    """The scores of an operand, float32, one for each query head."""
    what = "scores [heads, rows, columns] of the cells"
    x = content.operand(name, what)
    rows = len(positions(sides.rows, content.q.shape[2])[0])
    columns = len(positions(sides.columns, content.k.shape[2])[0])
    heads = content.q.shape[1], content.k.shape[1]
    if x.shape[1] not in (1, *heads) or x.shape[2:] != (rows, columns):
        raise ValueError(
            f"operand {name!r} has shape {x.shape[1:]} without its batch axis: it must "
            f"be (heads, {rows}, {columns}), a score for every cell of {sides.rows!r} "
            f"queries and {sides.columns!r} keys, with {heads[0]} heads, {heads[1]}, "
            "or 1 for all"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"operand {name!r} has dtype {x.dtype}: it must be of floats")
    return jnp.repeat(x.astype(jnp.float32), heads[0] // x.shape[1], axis=1)


def products(
    q: Float[Array, "batch heads rows dim"],
    k: Float[Array, "batch kv_heads columns dim"],
) -> Float[Array, "batch heads rows columns"]:
    """The products of each query head with its key head, without ``sm_scale``."""
    batch, heads, rows, dim = q.shape
    wide = q.reshape(batch, k.shape[1], -1, rows, dim)
    found = jnp.einsum("bgird,bgcd->bgirc", wide, k, precision="highest")
    return found.reshape(batch, heads, rows, k.shape[2])


def _pooled_scorer(by: str, content: Content, columns: Partition, scale: Any) -> Rows:
    """Scores rows by their mean queries and the pooled keys: "mean" or "min_max"."""
    if by == "mean":
        mean = pooled(content.k, columns, "mean")
        return lambda q: products(q, mean) * scale
    low, high = (pooled(content.k, columns, how) for how in ("min", "max"))

    def bound(q: Float[Array, "b h r d"]) -> Float[Array, "b h r c"]:
        # max(q * low, q * high) = max(q, 0) * high + min(q, 0) * low
        up = products(jnp.maximum(q, 0.0), high)
        return (up + products(jnp.minimum(q, 0.0), low)) * scale

    return bound


def _pair_scorer(
    by: str, content: Content, sides: CellSides, rest: tuple[Any, IndexMap | None]
) -> Rows:
    """Scores rows by all of their pairs: "max" or "attention"."""
    scale, eligible = rest
    keys = content.k.astype(jnp.float32)
    nodes = of_heads(eligible, sides.problem) if eligible is not None else ()
    at_keys = jnp.arange(keys.shape[2], dtype=jnp.int32)

    def of_rows(query: Any) -> Float[Array, "batch heads rows columns"]:
        q, at, real = query["q"], query["at"][0, 0], query["real"][0, 0]
        flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
        logits = (products(flat, keys) * scale).reshape(*q.shape[:-1], -1)
        held = real[None, :, :, None]
        if by == "max":
            lost, _ = grouped(held[None] & ~jnp.isfinite(logits), sides.columns, -1)
            logits = jnp.where(held[None], logits, -jnp.inf)
            cells, kept = grouped(logits, sides.columns, -1)
            cells = jnp.where(kept[(None,) * 4] & ~lost, cells, -jnp.inf)
            return jnp.where(lost.any(axis=(3, 5)), jnp.nan, cells.max(axis=(3, 5)))
        if nodes:
            query_at = at[:, :, None] + sides.first
            at_key = at_keys[None, None, :]
            held = held & pairs_at(nodes, query_at, at_key, sides.problem)
        # A logit that is not finite makes its own cell NaN, and no other one.
        finite = jnp.isfinite(logits)
        shares = softmax(logits, held[None] & finite)
        shares = jnp.where(held[None] & ~finite, jnp.nan, shares)
        cells, _ = grouped(shares, sides.columns, -1)
        count = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)
        count = count.astype(jnp.float32)[None, None, :, None]
        return jnp.sum(cells, axis=(3, 5)) / count

    return of_rows


def _attended_scorer(
    score: Attended, content: Content, sides: CellSides, scale: Any
) -> tuple[Any, Rows, int]:
    """``scorer`` of ``attended``: the mean over the queries of a row."""
    problem = sides.problem
    at, real = positions(sides.rows, sides.num_queries)
    keys = score.entries(content).astype(jnp.float32)
    last = np.arange(keys.shape[2]) * score.stride + score.length - 1
    last = jnp.asarray(last, jnp.int32)[None, None, None, None]
    query = {
        "q": grouped(content.q.astype(jnp.float32), sides.rows, -2)[0],
        "at": jnp.asarray(at + sides.first, jnp.int32)[None, None],
        "real": jnp.asarray(real, jnp.float32)[None, None],
    }

    def of_rows(x: Any) -> Float[Array, "batch heads rows columns"]:
        q = x["q"]
        flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
        logits = products(flat, keys) * scale
        logits = logits.reshape(*q.shape[:-1], keys.shape[2])
        past, finite = last <= x["at"][..., None], jnp.isfinite(logits)
        # A logit that is not finite makes its own cells NaN, and no other ones.
        weights = softmax(logits, past & finite) if keys.shape[2] else logits
        weights = jnp.where(past & ~finite, jnp.nan, weights)
        count = jnp.maximum(x["real"].sum(axis=3), 1.0)[..., None]
        weights = jnp.sum(weights * x["real"][..., None], axis=3) / count
        return score.shared(weights, sides.columns, problem.kv_seq_len)

    cost = query["q"].shape[0] * query["q"].shape[1] * at.shape[1]
    return query, of_rows, cost * max(1, keys.shape[2])


def _for_choices(
    held: Bool[Array, "nodes ..."], choices: int
) -> Bool[Array, "choices_or_1 ..."]:
    """Whether some head of each choice has a pair; one node stands for all heads."""
    if held.shape[0] == 1:
        return held
    return held.reshape(choices, -1, *held.shape[1:]).any(axis=1)


def _dot_scorer(
    score: Dot, arrays: DotArrays, sides: CellSides, eligible: IndexMap | None
) -> tuple[Any, Rows, int]:
    """``scorer`` of ``dot``: a cell has the greatest score of its eligible pairs."""
    problem = sides.problem
    at, real = positions(sides.rows, sides.num_queries)
    nodes = of_heads(eligible, problem) if eligible is not None else ()
    columns = len(positions(sides.columns, problem.kv_seq_len)[0])
    of_pairs = arrays.k.shape[3] == problem.kv_seq_len
    query = {
        "q": arrays.q[:, :, at],
        "at": jnp.asarray(at, jnp.int32)[None, None],
        "real": jnp.asarray(real)[None, None],
    }
    if arrays.weights is not None:
        query["weights"] = arrays.weights[:, :, at]
    at_keys = jnp.arange(problem.kv_seq_len, dtype=jnp.int32)[None, None]

    def of_rows(x: Any) -> Float[Array, "batch choices rows columns"]:
        flat = {n: v.reshape(*v.shape[:2], -1, *v.shape[4:]) for n, v in x.items()}
        own = DotArrays(flat["q"], flat.get("weights"), arrays.k)
        found = dot_scores(score, own)
        found = found.reshape(*found.shape[:2], *x["at"].shape[2:], -1)
        found = jnp.where(x["real"][..., None], found, -jnp.inf)
        if not of_pairs:
            return found.max(axis=3)
        if nodes:
            query_at = x["at"][0, 0][:, :, None] + sides.first
            held = pairs_at(nodes, query_at, at_keys, problem)
            # A choice of several heads may take what one of them may see.
            held = _for_choices(held, found.shape[1])
            found = jnp.where(held[None], found, -jnp.inf)
        cells, kept = grouped(found, sides.columns, -1)
        return jnp.where(kept, cells, -jnp.inf).max(axis=(3, 5))

    batch, choices = max(len(arrays.q), len(arrays.k)), arrays.q.shape[1]
    return (
        query,
        of_rows,
        batch * choices * at.shape[1] * max(columns, arrays.k.shape[3]),
    )


def softmax(
    x: Float[Array, "*axes"], where: Bool[Array, "*#axes"]
) -> Float[Array, "*axes"]:
    """The softmax over the last axis where ``where`` is true, 0 elsewhere.

    A row in which it is true nowhere is all 0.
    """
    x = jnp.where(where, x, -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True)
    p = jnp.where(where, jnp.exp(x - jnp.where(top == -jnp.inf, 0.0, top)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total == 0, 1.0, total)


def in_steps(function: Callable[[Any], Array], rows: Any, cost: int) -> Array:
    """Applies ``function`` to the rows (axis 2) of a tree of arrays, some at a time.

    ``cost`` is the numbers that a row takes; at most ``LIMIT`` are held at a time.
    """
    leaves = jax.tree.leaves(rows)
    length = leaves[0].shape[2]
    step = max(1, LIMIT // cost)
    if step >= length:
        return function(rows)
    steps = -(-length // step)

    def cut(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, steps * step - length)
        parts = jnp.pad(x, widths).reshape(*x.shape[:2], steps, step, *x.shape[3:])
        return jnp.moveaxis(parts, 2, 0)

    found = jax.lax.map(function, jax.tree.map(cut, rows))
    found = jnp.moveaxis(found, 0, 2)
    return found.reshape(*found.shape[:2], steps * step, *found.shape[4:])[
        :, :, :length
    ]
