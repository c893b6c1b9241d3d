"""Selections of cells: the best few, those above a threshold, a share of the mass."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from typing_extensions import override

from lowering.problem import Problem
from pallas_kernels.lists.call import held
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.selections import cell_lists, ranking
from sadsl.selections.attended import Attended
from sadsl.selections.base import Content, ListShape
from sadsl.selections.cell_scores import Score
from sadsl.selections.cells import BY_ROW, NO_RULES, Cells, Rest, Rules, Scope
from sadsl.selections.dot_scores import Dot
from sadsl.selections.tiles import GridTiles, Partition, num_parts

# Added to the sum of minmax scores, so that their shares stay below 1.
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
        """The share of the number of cells that is kept."""
        if self.of == "triangle":
            return 1 - math.sqrt(1 - self.fraction)
        return self.fraction


@dataclass(frozen=True, repr=False)
class Tokens:
    """A budget of the cells that hold ``count`` keys, at least one cell."""

    count: int

    def __post_init__(self) -> None:
        at_least("tokens", "count", self.count, 1)

    def __repr__(self) -> str:
        return call_text(self)


def share(fraction: float, *, plus: int = 0, of: str = "columns") -> Share:
    """A budget for ``topk``: a share of the cells of a row.

    The budget is ``floor(fraction * cells) + plus``, at least 1.

    Args:
      fraction: the share, from 0 to 1.
      plus: cells that are added to it.
      of: which cells are counted: ``"columns"``, all cells of a row; ``"eligible"``,
        the eligible ones; ``"triangle"``, all of them, and ``fraction`` is the share of
        a causal triangle: each row keeps ``1 - sqrt(1 - fraction)`` of its columns (Gao
        et al., SeerAttention, 2024, in the authors' code).

    Raises:
      ValueError: ``fraction`` or ``of`` is none of these.

    Example:
      >>> import sadsl as sa
      >>> sa.topk(share(0.25, of="eligible"), eligible=sa.causal())
      topk(share(0.25, of='eligible'), eligible=causal())
    """
    return Share(fraction, plus, of)


def tokens(count: int) -> Tokens:
    """A budget for ``topk`` in keys: ``count // block`` cells, at least one.

    Example:
      >>> import sadsl as sa
      >>> sa.topk(tokens(512), block=32)  # 16 cells
      topk(tokens(512), block=32)
    """
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

    @property
    @override
    def by_position(self) -> bool:
        # A share of all columns depends on how many keys there are.
        by_length = isinstance(self.k, Share) and self.k.of != "eligible"
        return super().by_position and not by_length

    @override
    def list_shape(self, problem: Problem) -> ListShape | None:
        found = self._listed(problem)
        if found is None or not cell_lists.may_list(found, problem):
            return None
        return ListShape(found.size, found.block_q, found.block, self.scope)

    @override
    def choose_lists(self, content: Content) -> Int[Array, "batch groups rows size"]:
        lengths = content.q.shape[2], content.k.shape[2]
        found = self._listed(Problem(*lengths, content.q.shape[1], content.q_offset))
        assert found is not None
        heads, frozen = self._heads_of_choice(content), lax.stop_gradient(content)
        return cell_lists.lists(found, self.score, frozen, heads)

    @override
    def chosen_by(
        self, listed: Int[Array, "batch groups rows size"], problem: Problem
    ) -> dict[str, Array]:
        found = held(listed, num_parts(self.block, problem.kv_seq_len))
        if self.scope == "shared":
            return {"chosen": found[:, 0]}
        return {
            "chosen": jnp.repeat(found, problem.num_heads // found.shape[1], axis=1)
        }

    def _listed(self, problem: Problem) -> cell_lists.Budget | None:
        """What lists must hold; None if its size is not a number of cells a row."""
        block, block_q = self.block, self.rows
        if isinstance(block, GridTiles) or isinstance(block_q, GridTiles):
            return None
        plain = self.rules == NO_RULES and self.score.normalise == "none"
        if isinstance(self.k, Share) or self.scope not in BY_ROW or not plain:
            return None
        each = self.k if isinstance(self.k, int) else max(1, self.k.count // block)
        each = min(each, num_parts(block, problem.kv_seq_len))
        return cell_lists.Budget(each, block_q, block, self.eligible, self.forced)

    def _budget(self, rest: Rest) -> Int[Array, "*sets"]:
        match self.k:
            case Share(of="eligible") as k:
                # Rows that share a budget: a share of all eligible cells in them.
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
    score: str | Score | Dot | Attended = "mean",
    scope: Scope = "query",
    forced: IndexMap | None = None,
    eligible: IndexMap | None = None,
    rules: Rules = NO_RULES,
) -> TopK:
    """Each row of cells keeps its ``k`` cells of the highest score.

    A cell is a block of queries and a block of keys; a row is the cells of one block of
    queries. Ties go to the lower key block. Ineligible cells and cells whose score is
    NaN or infinite are never chosen; where fewer than ``k`` are left, all of them are.
    Gradients flow through the attention, not through the choice.

    Args:
      k: the number of cells in a row, or ``share(...)`` of them, or ``tokens(...)``.
      block: the keys of a cell: a block size, or ``tiles`` of a grid.
      block_q: the queries of a cell; ``block`` if None; 1 chooses for each query.
      score: what is compared: "mean", "min_max", "max", "attention", the name of an
        operand, ``dot(...)``, ``attended(...)``, or ``scored(...)``, which explains
        them.
      scope: which cells share a budget. "query": each row of each head has its own;
        "group": the query heads of a key head make one choice by their mean score;
        "shared": all heads do; "head": the rows of a head share a budget of ``k`` a
        row; "overall": the rows of all heads do; "block": each key block has a budget
        over all queries and heads. Batch entries never share one.
      forced: a static map; eligible cells that hold one of its pairs are always chosen.
        They count in the budget unless ``rules`` says otherwise.
      eligible: a static map; only cells that hold one of its pairs are chosen. All
        cells are eligible if None.
      rules: see ``rules``.

    Raises:
      ValueError: a size, a name or a budget is not valid, or ``forced`` or ``eligible``
        reads run-time arrays.

    Example:
      >>> import sadsl as sa
      >>> spec = sa.causal() & sa.topk(2, block=2, eligible=sa.causal())
      >>> spec
      causal() & topk(2, block=2, eligible=causal())
      >>> chosen = [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]  # [heads, rows, columns]
      >>> print(spec.dense(6, operands={spec.b.key("chosen"): chosen})[0].astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [1 1 1 1 0 0]
       [0 0 1 1 1 0]
       [0 0 1 1 1 1]]
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
    score: str | Score | Dot | Attended = "mean",
    scope: Scope = "query",
    forced: IndexMap | None = None,
    eligible: IndexMap | None = None,
    rules: Rules = NO_RULES,
) -> Threshold:
    """Keeps the cells whose score is above ``t``.

    Args:
      t: the threshold. The scores "mean", "min_max" and "max" are logits, which include
        the factor ``sm_scale``.
      block, block_q, score, scope, forced, eligible, rules: as in ``topk``.

    Example:
      >>> import sadsl as sa
      >>> sa.causal() & sa.threshold(0.1, block=32, score="attention")
      causal() & threshold(0.1, block=32, score='attention')
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
    score: str | Score | Dot | Attended = SOFTMAX,
    scope: Scope = "query",
    forced: IndexMap | None = None,
    eligible: IndexMap | None = None,
    rules: Rules = NO_RULES,
) -> Mass:
    """Each row keeps the fewest cells whose scores add up to the share ``p`` of all.

    The highest scores are taken first; a negative score counts as 0. The scores of
    forced cells count towards ``p`` unless ``rules`` says otherwise.

    Args:
      p: the share, above 0; a share above 1 keeps every eligible cell.
      score: what is added up; a softmax over the eligible cells of the mean logits by
        default.
      block, block_q, scope, forced, eligible, rules: as in ``topk``.

    Raises:
      ValueError: ``p`` is not above 0, or as for ``topk``.

    Example:
      >>> import sadsl as sa
      >>> sa.causal() & sa.mass(0.9, block=32, eligible=sa.causal())
      causal() & mass(0.9, block=32, eligible=causal())
    """
    return Mass(
        p, block=block, block_q=block_q, score=_score(score), scope=scope,
        forced=forced, eligible=eligible, rules=rules,
    )  # fmt: skip


def _score(value: str | Score | Dot | Attended) -> Score:
    return value if isinstance(value, Score) else Score(value)
