"""Budgets over cells: the best few, those above a threshold, the mass."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from typing_extensions import override

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.selections import ranking
from sadsl.selections.cell_scores import Score
from sadsl.selections.cells import NO_RULES, Cells, Rest, Rules, Scope
from sadsl.selections.tiles import GridTiles, Partition

# What keeps the masses of minmax below 1.
EPS = 1e-6
SOFTMAX = Score("mean", "softmax")


@dataclass(frozen=True, repr=False)
class Share:
    """A budget of ``max(1, floor(fraction * cells) + plus)`` cells."""

    fraction: float
    plus: int = 0
    of: str = "columns"

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"share: fraction={self.fraction} must be from 0 to 1")
        if self.of not in ("columns", "eligible", "triangle"):
            raise ValueError(
                f"share: of={self.of!r} must be 'columns', 'eligible' or 'triangle'"
            )

    def __repr__(self) -> str:
        return call_text(self)

    @property
    def factor(self) -> float:
        """What the number of cells is multiplied by."""
        if self.of == "triangle":
            return 1 - math.sqrt(1 - self.fraction)
        return self.fraction


@dataclass(frozen=True, repr=False)
class Tokens:
    """A budget of as many cells as hold ``count`` keys, at least one."""

    count: int

    def __post_init__(self) -> None:
        at_least("tokens", "count", self.count, 1)

    def __repr__(self) -> str:
        return call_text(self)


def share(fraction: float, *, plus: int = 0, of: str = "columns") -> Share:
    """A budget as a share of the cells of a row.

    ``floor(fraction * cells) + plus``, at least 1, where ``of`` says which cells count:
    ``"columns"`` all of a row, ``"eligible"`` the eligible ones; ``"triangle"`` all,
    and the fraction is that of a causal triangle: ``1 - sqrt(1 - fraction)`` of the
    columns for each row keep so much of it (Gao et al., SeerAttention, 2024, in its
    code).
    """
    return Share(fraction, plus, of)


def tokens(count: int) -> Tokens:
    """A budget in keys: ``count // block`` cells."""
    return Tokens(count)


@dataclass(frozen=True, repr=False)
class TopK(Cells):
    """The ``k`` best cells; see ``topk``."""

    k: int | Share | Tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        match self.k:
            case Tokens() if isinstance(self.block, GridTiles):
                raise ValueError(f"topk: k={self.k!r} needs a block of a known size")
            case Tokens() | Share():
                pass
            case k:
                at_least("topk", "k", k, 1)
        if self.scope == "block":
            raise ValueError(
                "topk: scope='block' has no budget in cells: use 'head' or 'overall', "
                "or threshold or mass"
            )

    @override
    def keep(
        self,
        values: Float[Array, "*sets entries"],
        competing: Bool[Array, "*sets entries"],
        rest: Rest,
    ) -> Bool[Array, "*sets entries"]:
        count = self._budget(rest)
        if self.rules.forced_counts:
            count = count - jnp.sum(rest.forced, axis=-1, dtype=jnp.int32)
        return ranking.top(values, competing, jnp.maximum(count, 0))

    def _budget(self, rest: Rest) -> Int[Array, "*sets"]:
        match self.k:
            case Share(of="eligible") as k:
                # Shares of a set of rows: of all that is eligible in it.
                count = jnp.sum(rest.eligible, axis=-1, dtype=jnp.int32)
                part = jnp.floor(count.astype(jnp.float32) * k.factor + 1e-4)
                plus = k.plus * rest.rows
                return jnp.maximum(part.astype(jnp.int32) + plus, rest.rows)
            case Share() as k:
                each = max(1, int(k.factor * rest.columns + 1e-9) + k.plus)
            case Tokens(count):
                assert isinstance(self.block, int)
                each = max(1, count // self.block)
            case each:
                pass
        return jnp.full(rest.eligible.shape[:-1], each * rest.rows, jnp.int32)


@dataclass(frozen=True, repr=False)
class Threshold(Cells):
    """The cells with a score above ``t``; see ``threshold``."""

    t: float

    @override
    def keep(
        self,
        values: Float[Array, "*sets entries"],
        competing: Bool[Array, "*sets entries"],
        rest: Rest,
    ) -> Bool[Array, "*sets entries"]:
        return competing & (values > self.t)


@dataclass(frozen=True, repr=False)
class Mass(Cells):
    """The fewest cells that hold the share ``p`` of the scores; see ``mass``."""

    p: float
    score: Score = field(default=SOFTMAX, kw_only=True)

    sums_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.p > 0:
            raise ValueError(f"mass: p={self.p} must be above 0")

    @override
    def keep(
        self,
        values: Float[Array, "*sets entries"],
        competing: Bool[Array, "*sets entries"],
        rest: Rest,
    ) -> Bool[Array, "*sets entries"]:
        values = jnp.maximum(values, 0.0)
        total = jnp.sum(jnp.where(rest.valid, values, 0.0), axis=-1)
        if self.score.normalise == "minmax":
            total = total + EPS
        target = self.p * total
        if self.rules.forced_counts:
            forced = rest.forced & rest.valid
            target = target - jnp.sum(jnp.where(forced, values, 0.0), axis=-1)
        return ranking.heaviest(values, competing, target)


def topk(
    k: int | Share | Tokens,
    *,
    block: Partition = 64,
    block_q: Partition | None = None,
    score: str | Score = "mean",
    scope: Scope = "query",
    forced: IndexMap | None = None,
    eligible: IndexMap | None = None,
    rules: Rules = NO_RULES,
) -> TopK:
    """The ``k`` best cells of every row.

    Of equal scores the lower key block wins. Scores that are NaN or infinite, and
    ineligible cells, are never chosen; where fewer are left than ``k``, all of them
    are. Gradients flow through the attention, never through the choice.

    Args:
      k: cells a row, ``share(...)`` of them, or as many as hold ``tokens(...)`` keys.
      block: keys of a cell: a block size, or ``tiles`` of a grid.
      block_q: queries of a cell, as ``block`` if None; 1 for a choice by query.
      score: what is compared: "mean", "min_max", "max", "attention", the name of an
        operand, or ``scored(...)``, where they are explained.
      scope: who shares a budget: "query", every row of a head has its own; "group", all
        query heads of a key head make one choice by their mean score, "shared", all
        heads do; "head", the rows of a head share one budget of ``k`` a row; "overall",
        the heads do as well; "block", every key block has its own over all queries and
        heads. No budget is shared by entries of a batch.
      forced: cells with a pair of this static map are chosen in any case, if eligible;
        they use up the budget unless ``rules`` say otherwise.
      eligible: only cells with a pair of this static map are chosen; all, if None.
      rules: see ``rules``.

    Raises:
      ValueError: a size, a name or a budget is none, or a map reads run-time arrays.
    """
    return TopK(
        k, block=block, block_q=block_q, score=_score(score), scope=scope,
        forced=forced, eligible=eligible, rules=rules,
    )  # fmt: skip


def threshold(
    t: float,
    *,
    block: Partition = 64,
    block_q: Partition | None = None,
    score: str | Score = "mean",
    scope: Scope = "query",
    forced: IndexMap | None = None,
    eligible: IndexMap | None = None,
    rules: Rules = NO_RULES,
) -> Threshold:
    """The cells whose score is above ``t``; the other arguments are those of ``topk``.

    Scores of "mean", "min_max" and "max" are logits: ``sm_scale`` is a factor of them.
    """
    return Threshold(
        t, block=block, block_q=block_q, score=_score(score), scope=scope,
        forced=forced, eligible=eligible, rules=rules,
    )  # fmt: skip


def mass(
    p: float,
    *,
    block: Partition = 64,
    block_q: Partition | None = None,
    score: str | Score = SOFTMAX,
    scope: Scope = "query",
    forced: IndexMap | None = None,
    eligible: IndexMap | None = None,
    rules: Rules = NO_RULES,
) -> Mass:
    """The fewest cells that hold the share ``p`` of all scores of a set.

    The greatest scores first; negative ones count as 0. What forced cells hold counts
    towards ``p``, unless ``rules`` say otherwise. The other arguments are those of
    ``topk``; a ``p`` above 1 chooses every eligible cell.
    """
    return Mass(
        p, block=block, block_q=block_q, score=_score(score), scope=scope,
        forced=forced, eligible=eligible, rules=rules,
    )  # fmt: skip


def _score(value: str | Score) -> Score:
    return value if isinstance(value, Score) else Score(value)
