"""The base class of the selections that score cells and keep some of them.

A cell is a block of queries and a block of keys, or tiles of a grid. One static map
says which cells are eligible, another one which cells are always chosen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from typing_extensions import override

from lowering import ir
from lowering.problem import Problem
from lowering.run_time.packed import PackedBools, words_of
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections import ranking
from sadsl.selections.base import Content, Leak, Selection
from sadsl.selections.cell_scores import (
    MEAN,
    CellSides,
    Score,
    cell_sides,
    in_steps,
    scorer,
    softmax,
)
from sadsl.selections.dot_scores import Dot
from sadsl.selections.static_cells import (
    StaticCells,
    check_static,
    heads_of,
    holding,
)
from sadsl.selections.tiles import (
    GridTiles,
    Partition,
    check,
    check_length,
    num_parts,
    part_of,
)

Scope = Literal["query", "group", "shared", "head", "block", "overall"]
# Scopes in which every row of cells has a budget of its own.
BY_ROW = ("query", "group", "shared")
SCOPES = (*BY_ROW, "head", "block", "overall")
# minmax treats a smaller range of scores as 0.
LEAST_RANGE = 1e-6


@dataclass(frozen=True, repr=False)
class Rules:
    """Details of a budget; made by ``rules``."""

    forced_counts: bool = True
    at_least: int = 0
    otherwise: str = "forced"

    def __post_init__(self) -> None:
        at_least("rules", "at_least", self.at_least, 0)
        if self.otherwise not in ("forced", "eligible"):
            raise ValueError(
                f"rules: otherwise={self.otherwise!r} must be 'forced' or 'eligible'"
            )

    def __repr__(self) -> str:
        return call_text(self)


def rules(
    *, forced_counts: bool = True, at_least: int = 0, otherwise: str = "forced"
) -> Rules:
    """Details of the budgets of ``topk``, ``threshold`` and ``mass``.

    Args:
      forced_counts: whether forced cells count in the budget.
      at_least: the least number of cells that are chosen besides the forced ones, for
        each budget and whatever their scores, if as many are eligible.
      otherwise: what a batch entry keeps if only forced cells are chosen in it: these
        "forced" cells, or all "eligible" cells.

    Raises:
      ValueError: ``otherwise`` is not one of these, or ``at_least`` is negative.

    Example:
      >>> import sadsl as sa
      >>> sa.threshold(0.5, rules=rules(at_least=1))
      threshold(0.5, rules=rules(at_least=1))
    """
    return Rules(forced_counts, at_least, otherwise)


NO_RULES = Rules()


@dataclass(frozen=True, repr=False, kw_only=True)
class Cells(Selection):
    """The base of ``TopK``, ``Threshold`` and ``Mass``: the choice is a bool a cell."""

    block: Partition = 64
    block_q: Partition | None = None
    score: Score = MEAN
    scope: Scope = "query"
    forced: IndexMap | None = None
    eligible: IndexMap | None = None
    rules: Rules = NO_RULES

    # Whether the scores of forced cells influence which other cells are chosen.
    sums_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        check(name, "block", self.block)
        check(name, "block_q", self.rows)
        check_static(name, "forced", self.forced)
        check_static(name, "eligible", self.eligible)
        if self.scope not in SCOPES:
            raise ValueError(f"{name}: scope={self.scope!r} must be one of {SCOPES}")

    @override
    def __repr__(self) -> str:
        return call_text(self, type(self).__name__.lower())

    @property
    def rows(self) -> Partition:
        """How the queries are divided into rows of cells."""
        return self.block if self.block_q is None else self.block_q

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return self.score.operands

    @property
    @override
    def of_keys(self) -> Mapping[str, int]:
        return {self.score.by.k: 0} if isinstance(self.score.by, Dot) else {}

    @property
    @override
    def leak(self) -> Leak:  # type: ignore[override]
        return _leak(self)

    @property
    @override
    def by_position(self) -> bool:
        plain = self.rows == 1 and isinstance(self.block, int)
        alone = self.scope in BY_ROW and self.rules.otherwise == "forced"
        maps = [a for a in (self.eligible, self.forced) if a is not None]
        fixed = not any(_of_one_length(a) for a in maps)
        return plain and alone and fixed and not self.score.is_operand

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        cell = part_of(self.rows, q), part_of(self.block, k)
        index = cell if self.scope == "shared" else (h, *cell)
        return self.part("chosen")[index] == 1

    def keep(
        self,
        values: Float[Array, "*sets entries"],
        competing: Bool[Array, "*sets entries"],
        rest: "Rest",
    ) -> Bool[Array, "*sets entries"]:
        """The competing cells that are kept, besides the forced ones."""
        raise NotImplementedError(f"{type(self).__name__} must define keep(...)")

    @override
    def choose(self, content: Content) -> dict[str, Array]:
        return {"chosen": self._chosen(content, lambda found: found)}

    @override
    def choose_packed(self, content: Content) -> dict[str, Array | PackedBools]:
        columns = num_parts(self.block, content.k.shape[2])
        return {"chosen": PackedBools(self._chosen(content, words_of), columns)}

    def _chosen(self, content: Content, form: Callable[[Array], Array]) -> Array:
        """The chosen cells, by strips of rows; ``form`` is applied to each strip."""
        sides = self._sides(content)
        problem = sides.problem
        size = self._heads_of_choice(content)
        masks = self._masks(sides)
        sources = content, sides, self.eligible, problem.num_heads // size
        query, of_rows, cost = scorer(self.score, *sources)
        # The scores of dot(...) are those of a choice already.
        own = isinstance(self.score.by, Dot)

        def cells(row: Array) -> Mapping[str, Array]:
            # For heads that choose as one, a cell that is eligible (or forced) for one
            # of them is so for all.
            found = {n: _over_heads(of(row), size, jnp.any) for n, of in masks.items()}
            found["forced"] &= found["eligible"]
            return found

        def decide(row: Array, scores: Array) -> Array:
            found = cells(row)
            if not own:
                found = {n: _of_heads(m, size) for n, m in found.items()}
            return form(self._decide({**found, "scores": scores}, 1 if own else size))

        rows = jnp.arange(num_parts(self.rows, sides.num_queries), dtype=jnp.int32)
        each = {"row": rows[None, None], "query": query}
        if self.scope in BY_ROW:
            chosen = in_steps(
                lambda x: decide(x["row"][0, 0], of_rows(x["query"])),
                each,
                cost,
            )
        else:
            chosen = decide(rows, in_steps(of_rows, query, cost))
        if self.rules.otherwise == "eligible":
            forced, eligible = (
                in_steps(
                    lambda x, n=n: form(cells(x["row"][0, 0])[n]),
                    {"row": each["row"]},
                    cost,
                )
                for n in ("forced", "eligible")
            )
            more = (chosen & ~forced).astype(bool)  # of bools or of words
            some = jnp.any(more, axis=(1, 2, 3), keepdims=True)
            chosen = jnp.where(some, chosen, eligible)
        if self.scope == "shared":
            return chosen[:, 0]
        shape = len(chosen), problem.num_heads, *chosen.shape[2:]
        return jnp.broadcast_to(jnp.repeat(chosen, size, axis=1), shape)

    def _masks(
        self, sides: CellSides
    ) -> dict[str, Callable[[Array], Bool[Array, "1 heads_or_1 rows columns"]]]:
        """Which cells of some rows are forced and eligible, by their numbers."""
        columns = num_parts(sides.columns, sides.problem.kv_seq_len)
        known = isinstance(sides.first, int)

        def of(a: IndexMap | None, value: bool) -> Callable[[Array], Array]:
            if a is None:
                return lambda row: jnp.full((1, 1, len(row), columns), value)
            args = a, sides.rows, sides.columns, sides.problem
            if known:
                return StaticCells(*args).at
            found = StaticCells(*args, coarse=False)
            return lambda row: found.at(row + sides.first)

        masks = {"forced": of(self.forced, False), "eligible": of(self.eligible, True)}
        if self.score.normalise == "whole_softmax" and self.eligible is not None:
            masks["broken"] = of(~self.eligible, False)
        return masks

    def _heads_of_choice(self, content: Content) -> int:
        """The number of query heads that make one choice."""
        sizes = {"group": content.group, "shared": content.q.shape[1]}
        return sizes.get(self.scope, 1)

    def _sides(self, content: Content) -> CellSides:
        lengths = content.q.shape[2], content.k.shape[2]
        check_length(self.rows, lengths[0], "queries")
        check_length(self.block, lengths[1], "keys")
        return cell_sides(self.rows, self.block, content)

    def _decide(
        self, x: Mapping[str, Array], size: int
    ) -> Bool[Array, "batch heads rows columns"]:
        """The chosen cells of some rows, or of all, with the forced ones.

        ``size`` heads choose as one; they are one head in the result.
        """
        scores = x["scores"]
        masks = {n: m for n, m in x.items() if n in ("forced", "eligible", "broken")}
        if self.scope not in BY_ROW:
            wide = (1, *scores.shape[1:])
            masks = {n: jnp.broadcast_to(m, wide) for n, m in masks.items()}
        sets = {n: to_sets(m, self.scope) for n, m in masks.items()}
        values = to_sets(scores, self.scope)
        weights = _weights(self.score.normalise, values, sets)
        if size > 1:
            weights = _over_heads(weights, size, jnp.mean)
            sets = {n: _over_heads(m, size, jnp.any) for n, m in sets.items()}
        forced, eligible = sets["forced"], sets["eligible"]
        valid = eligible & jnp.isfinite(weights)
        weights = jnp.where(valid, weights, 0.0)
        competing = valid & ~forced
        rows = 1 if self.scope in BY_ROW else weights.shape[-1] // scores.shape[-1]
        rest = Rest(forced, eligible, valid, rows, scores.shape[-1])
        kept = self.keep(weights, competing, rest)
        if self.rules.at_least:
            least = jnp.full(weights.shape[:-1], self.rules.at_least, jnp.int32)
            kept = kept | ranking.top(weights, competing, least)
        return from_sets(kept | forced, self.scope, scores.shape)


@dataclass(frozen=True)
class Rest:
    """What else ``keep`` may read; a set holds the cells that share a budget."""

    forced: Bool[Array, "*sets entries"]
    eligible: Bool[Array, "*sets entries"]
    valid: Bool[Array, "*sets entries"]  # eligible, with a finite score
    rows: int  # rows of cells in a set
    columns: int  # cells in a row


def to_sets(x: Array, scope: Scope) -> Array:
    """Reshapes ``[batch, heads, rows, columns]`` so that the last axis is a set."""
    batch, heads = x.shape[:2]
    match scope:
        case "head":
            return x.reshape(batch, heads, -1)
        case "overall":
            return x.reshape(batch, -1)
        case "block":
            return jnp.moveaxis(x, 3, 1).reshape(batch, x.shape[3], -1)
        case _:
            return x


def from_sets(x: Array, scope: Scope, shape: tuple[int, ...]) -> Array:
    """The inverse of ``to_sets``; ``shape`` is that of the scores."""
    batch, heads, rows, columns = shape
    match scope:
        case "head" | "overall":
            return x.reshape(batch, heads, rows, columns)
        case "block":
            return jnp.moveaxis(x.reshape(batch, columns, heads, rows), 1, 3)
        case _:
            return x


def _over_heads(x: Array, size: int, how: Any) -> Array:
    """Reduces each ``size`` heads of axis 1 to one by ``how``; a single head stays."""
    if x.shape[1] == 1:
        return x
    return how(x.reshape(x.shape[0], -1, size, *x.shape[2:]), axis=2)


def _of_heads(x: Array, size: int) -> Array:
    """The inverse of ``_over_heads``, for what a choice has in common."""
    return jnp.repeat(x, size, axis=1) if x.shape[1] > 1 else x


def _weights(normalise: str, values: Array, sets: Mapping[str, Array]) -> Array:
    """The normalised scores; NaN where a cell is ineligible or has no finite score."""
    valid = sets["eligible"] & jnp.isfinite(values)
    match normalise:
        case "softmax" | "whole_softmax":
            whole = valid & ~sets["broken"] if "broken" in sets else valid
            found = softmax(jnp.where(valid, values, 0.0), whole)
        case "minmax":
            low = jnp.where(valid, values, jnp.inf).min(axis=-1, keepdims=True)
            high = jnp.where(valid, values, -jnp.inf).max(axis=-1, keepdims=True)
            extent = jnp.where(high - low > LEAST_RANGE, high - low, 1.0)
            found = (values - low) / extent
        case _:
            return values
    return jnp.where(valid, found, jnp.nan)


def _of_one_length(a: IndexMap) -> bool:
    """Whether a map is made for one number of keys, or reads it."""
    return any(isinstance(n, ir.Within) or n == ir.Var("n") for n in ir.walk(a.node))


@lru_cache(maxsize=256)
def _leak(cells: Cells) -> Leak:
    """The leak, found on the cells of a short sequence; "all" if it is not certain."""
    rows, columns, eligible = cells.rows, cells.block, cells.eligible
    if cells.scope not in BY_ROW or eligible is None or isinstance(columns, GridTiles):
        return "all"
    if cells.rules.otherwise == "eligible":
        # What a batch entry keeps then depends on the choices of all its rows.
        return "all"
    if isinstance(rows, GridTiles):
        return "all"
    length = 16 * max(rows, columns) + 1
    problem = Problem(length, length, heads_of(eligible, cells.forced))
    try:
        allowed = np.asarray(holding(eligible, rows, columns, problem))
        forced = np.zeros_like(allowed)
        if cells.forced is not None:
            forced = np.asarray(holding(cells.forced, rows, columns, problem))
    except ValueError:
        return "all"
    first_query = np.arange(allowed.shape[1])[:, None] * rows
    first_key = np.arange(allowed.shape[2]) * columns
    last_key = np.minimum(first_key + columns, length) - 1
    if (allowed & (first_key > first_query + rows - 1)).any():
        return "all"
    # The scores of forced cells are not read, unless they influence the other cells.
    weighed = cells.score.normalise in ("softmax", "minmax") or cells.sums_scores
    read = allowed if weighed else allowed & ~forced
    own = rows == 1 and not (read & (last_key > first_query)).any()
    return "none" if own else "block"
