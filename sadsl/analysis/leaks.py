"""``selection_leak``: tests whether the keys chosen for a query depend on later tokens.

A causal map hides later keys from a query. Its *choice* of keys may still depend on
later tokens, and published mechanisms differ in this. The field ``leak`` of a selection
declares it, and ``selection_leak`` tests it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from sadsl.maps.base import IndexMap
from sadsl.run.call import select
from sadsl.selections.base import Leak, selections_of
from sadsl.terms.base import Spec
from sadsl.text.specs import as_term

# The values of `leak`, from no dependence on later tokens to any.
ORDER: tuple[Leak, ...] = ("none", "block", "all")

# A distance in tokens, and the (prefix, head, query, key) that shows it, or None.
Found: TypeAlias = tuple[int, tuple[int, int, int, int] | None]

# Makes the run-time arrays of a call from its q and k, [batch, seq, heads, head_dim].
MakeOperands: TypeAlias = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """The sizes of the random content on which ``selection_leak`` tests.

    In each of ``repeats`` sequences of ``n`` tokens, and for each of ``cuts`` (every
    position if None), the last ``n - cut`` tokens are replaced.
    """

    n: int = 48
    num_heads: int = 1
    head_dim: int = 8
    cuts: tuple[int, ...] | None = None
    repeats: int = 2
    seed: int = 0

    @property
    def each_cut(self) -> tuple[int, ...]:
        """The lengths of the prefixes that are not replaced."""
        return tuple(range(1, self.n)) if self.cuts is None else self.cuts


@dataclass(frozen=True)
class SelectionLeak:
    """The result of ``selection_leak``.

    Attributes:
      declared: the worst ``leak`` that the selections declare.
      leaks: whether some choice changed with a later token.
      distance: a lower bound of how many tokens a choice looks ahead: for some query
        and key the choice changed when only tokens at least this many positions after
        both were replaced. 0 without a leak.
      example: ``(prefix, head, query, key)`` of that pair, or None.
    """

    declared: Leak
    leaks: bool
    distance: int
    example: tuple[int, int, int, int] | None

    def __str__(self) -> str:
        if self.example is None:
            return f"declared {self.declared!r}; no choice changed with later tokens"
        prefix, head, query, key = self.example
        return (
            f"declared {self.declared!r}; choices look at least {self.distance} tokens "
            f"ahead: in head {head}, whether query {query} sees key {key} changed with "
            f"the tokens from {prefix} on"
        )


def declared_leak(spec: Spec | str) -> Leak | None:
    """The worst ``leak`` of the selections of a spec; None if it has no selection."""
    found = [s.leak for s in selections_of(as_term(spec))]
    return max(found, key=ORDER.index) if found else None


def selection_leak(
    spec: Spec | str, operands: MakeOperands | None = None, trial: Trial | None = None
) -> SelectionLeak:
    """Tests on random content whether choices within a prefix depend on later tokens.

    The selected pairs of a prefix must not change when all tokens after it are
    replaced. No change on random content is no proof: a leak may be rare.

    Args:
      spec: a map, a term or text with a selection in it.
      operands: a function that makes the run-time arrays that the selections read from
        q and k, ``[batch, n, heads, head_dim]``. An array with an entry for each token
        has a batch axis, and each entry must be computed from its token alone. Other
        arrays are the same for the whole batch.
      trial: the sizes of the content; queries and keys have equally many heads.

    Raises:
      ValueError: the spec has no selection.
    """
    term, trial = as_term(spec), trial or Trial()
    declared = declared_leak(term)
    if declared is None:
        raise ValueError(
            f"{term.map!r} has no selection, so no choice can leak: give a map with "
            "topk(...), kmeans(...) or another selection"
        )
    rng = np.random.default_rng(trial.seed)
    find = jax.jit(lambda q, k, given: select(term, q, k, operands=given))
    best: Found = (0, None)
    for _ in range(trial.repeats):
        q, k = _content(trial, rng)
        given = {} if operands is None else dict(operands(q, k))
        made = find(q, k, given)
        parts: dict[str, Any] = {name: np.asarray(x) for name, x in made.items()}
        found = _longest(trial.each_cut, _pairs(term.map, trial, parts))
        best = max(best, found, key=lambda each: each[0])
    return SelectionLeak(declared, best[0] > 0, *best)


def _content(trial: Trial, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """q and k with a batch: the original first, then one entry for each prefix.

    In the entry of a prefix, all tokens after the prefix are replaced.
    """
    shape = 2, 2, trial.n, trial.num_heads, trial.head_dim
    old, new = rng.normal(size=shape).astype(np.float32)
    after = np.arange(trial.n) >= np.array([trial.n, *trial.each_cut])[:, None]
    q, k = np.where(after[None, ..., None, None], new[:, None], old[:, None])
    return q, k


def _longest(cuts: tuple[int, ...], pairs: np.ndarray) -> Found:
    """The changed pair that is farthest before the replaced tokens, of all prefixes."""
    best: Found = (0, None)
    for cut, row in zip(cuts, pairs[1:], strict=True):
        changed = (row != pairs[0])[:, :cut, :cut]
        if changed.any():
            where = np.argwhere(changed)
            head, query, key = where[where[:, 1:].max(axis=1).argmin()].tolist()
            distance = cut - max(query, key)
            best = max(best, (distance, (cut, head, query, key)), key=lambda x: x[0])
    return best


def _pairs(index_map: IndexMap, trial: Trial, parts: Mapping[str, Any]) -> np.ndarray:
    """The selected pairs of every batch entry, bool ``[batch, heads, q, k]``."""
    rows = []
    for b in range(1 + len(trial.each_cut)):
        given = {name: x[b if len(x) > 1 else 0] for name, x in parts.items()}
        rows.append(index_map.dense(trial.n, num_heads=trial.num_heads, operands=given))
    return np.stack(rows)
