"""What a cell of queries and keys is worth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.selections.base import Content
from sadsl.selections.static_cells import of_heads, pairs_at
from sadsl.selections.tiles import Partition, grouped, pooled, positions

POOLED = ("mean", "min_max")
EVERY_PAIR = ("max", "attention")
NORMALISE = ("none", "softmax", "whole_softmax", "minmax")
# Scores, or pairs, that are held at a time.
LIMIT = 1 << 20


@dataclass(frozen=True, repr=False)
class Score:
    """What is compared; see ``scored``."""

    by: str
    normalise: str = "none"
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or not self.by.isidentifier():
            known = ", ".join(map(repr, (*POOLED, *EVERY_PAIR)))
            raise ValueError(
                f"score={self.by!r} must be {known}, or the name of an operand that "
                "holds the scores"
            )
        if self.normalise not in NORMALISE:
            raise ValueError(f"normalise={self.normalise!r} must be one of {NORMALISE}")

    def __repr__(self) -> str:
        plain = self == Score(self.by)
        return repr(self.by) if plain else call_text(self, "scored")

    @property
    def is_operand(self) -> bool:
        """Whether the scores are passed by name."""
        return self.by not in (*POOLED, *EVERY_PAIR)


MEAN = Score("mean")


def scored(by: str, *, normalise: str = "none", scale: float | None = None) -> Score:
    """How cells are scored.

    Args:
      by: "mean", the mean query of the cell on its mean key; "min_max", the bound
        ``sum_d max(q_d * min_d, q_d * max_d)`` over its keys, of the mean query (Tang
        et al., Quest, 2024, section 3.3); "max", the largest logit of any of its pairs;
        "attention", the share of the softmax over the eligible keys that falls in it,
        on average over its queries; else the name of an operand that holds scores
        ``[heads, rows, columns]``, for every query head, key head or one for all. "max"
        and "attention" compute every pair, a few rows at a time.
      normalise: "softmax" over the eligible cells of a set (a row, unless the scope
        says otherwise); "whole_softmax", over those of them without an ineligible pair,
        with 0 for the others; "minmax", linearly from 0 to 1 over the eligible ones;
        "none".
      scale: the factor of the logits, the ``sm_scale`` of the call if None; scores that
        are passed are taken as they are.
    """
    return Score(by, normalise, scale)


Rows = Callable[[Any], Float[Array, "batch heads rows columns"]]


@dataclass(frozen=True)
class CellSides:
    """How the queries and the keys of a call fall into cells."""

    rows: Partition
    columns: Partition
    problem: Problem


def scorer(
    score: Score, content: Content, sides: CellSides, eligible: IndexMap | None
) -> tuple[Any, Rows, int]:
    """What the rows are scored from, the function that does it, and its cost.

    The first is a tree of arrays ``[batch or 1, heads or 1, rows, ...]``; the function
    takes some rows of it; the cost is the numbers that it holds for one row.

    Raises:
      ValueError: scores that are passed do not have the shape of the cells.
    """
    batch, num_heads = content.q.shape[:2]
    columns = len(positions(sides.columns, content.k.shape[2])[0])
    if score.is_operand:
        given = _given(score.by, content, sides)
        return given, lambda x: x, batch * num_heads * columns
    scale = content.sm_scale if score.scale is None else score.scale
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
    what = "scores [heads, rows, columns] of the cells"
    x = content.operand(name, what)
    rows = len(positions(sides.rows, content.q.shape[2])[0])
    columns = len(positions(sides.columns, content.k.shape[2])[0])
    heads = content.q.shape[1], content.k.shape[1]
    if x.shape[1] not in (1, *heads) or x.shape[2:] != (rows, columns):
        raise ValueError(
            f"operand {name!r} has shape {x.shape[1:]} beside the batch: it must be "
            f"(heads, {rows}, {columns}), a score for every cell of {sides.rows!r} "
            f"queries and {sides.columns!r} keys, with {heads[0]} heads, {heads[1]} or "
            "one for all"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"operand {name!r} has dtype {x.dtype}: it must be of floats")
    return jnp.repeat(x.astype(jnp.float32), heads[0] // x.shape[1], axis=1)


def products(
    q: Float[Array, "batch heads rows dim"],
    k: Float[Array, "batch kv_heads columns dim"],
) -> Float[Array, "batch heads rows columns"]:
    """Queries on the keys of their group."""
    batch, heads, rows, dim = q.shape
    wide = q.reshape(batch, k.shape[1], -1, rows, dim)
    found = jnp.einsum("bgird,bgcd->bgirc", wide, k, precision="highest")
    return found.reshape(batch, heads, rows, k.shape[2])


def _pooled_scorer(by: str, content: Content, columns: Partition, scale: float) -> Rows:
    if by == "mean":
        mean = pooled(content.k, columns, "mean")
        return lambda q: products(q, mean) * scale
    low, high = (pooled(content.k, columns, how) for how in ("min", "max"))

    def bound(q: Float[Array, "b h r d"]) -> Float[Array, "b h r c"]:
        up = products(jnp.maximum(q, 0.0), high)
        return (up + products(jnp.minimum(q, 0.0), low)) * scale

    return bound


def _pair_scorer(
    by: str, content: Content, sides: CellSides, rest: tuple[float, IndexMap | None]
) -> Rows:
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
            query_at = at[:, :, None] + sides.problem.q_offset
            at_key = at_keys[None, None, :]
            held = held & pairs_at(nodes, query_at, at_key, sides.problem)
        # A logit that is no number spoils its own cell, not the softmax of the others.
        finite = jnp.isfinite(logits)
        shares = softmax(logits, held[None] & finite)
        shares = jnp.where(held[None] & ~finite, jnp.nan, shares)
        cells, _ = grouped(shares, sides.columns, -1)
        count = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)
        count = count.astype(jnp.float32)[None, None, :, None]
        return jnp.sum(cells, axis=(3, 5)) / count

    return of_rows


def softmax(
    x: Float[Array, "*axes"], where: Bool[Array, "*#axes"]
) -> Float[Array, "*axes"]:
    """The softmax over the last axis where it is allowed, 0 elsewhere and in all."""
    x = jnp.where(where, x, -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True)
    p = jnp.where(where, jnp.exp(x - jnp.where(top == -jnp.inf, 0.0, top)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total == 0, 1.0, total)


def in_steps(function: Callable[[Any], Array], rows: Any, cost: int) -> Array:
    """``function`` of a tree of arrays by rows (axis 2), as many at a time as fit."""
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
