"""``properties``: causality, coverage, hops and growth, from a map's expression."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from lowering import ir
from lowering.expr.simplify import simplify
from lowering.facts.count_pairs import count_pairs
from lowering.facts.first_and_last import first_and_last
from lowering.facts.hops import Hops, hops
from sadsl.analysis.cache import Cache, cache, first_offence, head_maps
from sadsl.analysis.leaks import declared_leak
from sadsl.maps.named import Where
from sadsl.selections.base import Leak, widest
from sadsl.terms.base import Spec
from sadsl.text.specs import map_of

# The growth of the number of pairs is fitted at the lengths n // part.
PARTS = (8, 4, 2, 1)
NAMES = {0.0: "1", 0.5: "n^0.5", 1.0: "n", 1.5: "n^1.5", 2.0: "n^2"}


@dataclass(frozen=True, eq=False)
class Properties:
    """The properties of a map on ``n`` positions, found by ``properties``.

    In a causal map the keys with ``k <= q`` are *visible* to a query, and in other maps
    all keys are. All numbers are about the pairs that *some* head has, except
    ``worst_head`` and ``num_empty_rows``. For a map that content decides, they are
    about the pairs that some content may choose.

    Attributes:
      n, num_heads: the given sizes.
      causal: whether no head lets a query see a later key.
      offence: if not causal, the first such pair ``(head, q, k)``, by q, then k, then
        head.
      worst_head: the head with the most queries that see no key.
      num_empty_rows, empty_rows: the number of such queries in that head, and the first
        of them.
      num_unseen_keys, unseen_keys: the number of keys that no query of any head sees,
        and the first of them.
      num_pairs: the number of pairs that some head has.
      coverage: their share of the visible pairs, which is the reach of one layer.
      hops: the number of layers until every visible key can influence every query.
      last_use: the last query that sees each key, over all heads; -1 for none.
      cache: the smallest cache for decoding; None if the map is not causal.
      growth, exponent: how the number of pairs grows with n, as a name and as a fitted
        exponent; None if the map is made for this length.
      selection_leak: how far the choice of keys may depend on later tokens, by design:
        "none", "block" (on those of the query's block), "all", or None if content
        decides nothing.
    """

    n: int
    num_heads: int
    causal: bool
    offence: tuple[int, int, int] | None
    worst_head: int
    num_empty_rows: int
    empty_rows: tuple[int, ...]
    num_unseen_keys: int
    unseen_keys: tuple[int, ...]
    num_pairs: int
    coverage: float
    hops: Hops
    last_use: Int64[np.ndarray, " n"]
    cache: Cache | None
    growth: str | None
    exponent: float | None
    selection_leak: Leak | None = None

    @property
    def reach_by_depth(self) -> tuple[tuple[int, float, float], ...]:
        """``(depth, least share, most share)`` of the visible pairs reached so far."""
        return self.hops.reach

    def rows(self) -> list[tuple[str, str]]:
        """The names and values that ``print`` shows."""
        allowed = "k <= q" if self.causal else "all"
        cache_text = "none: the map is not causal"
        if self.cache is not None:
            cache_text = str(self.cache).replace("\n", "; ")
        leak = self.selection_leak
        shown = [] if leak is None else [("selection leak", leak)]
        return [
            ("positions, heads", f"{self.n:,}, {self.num_heads}"),
            ("causal", self._causal_text()),
            ("queries without a key", self._empty_text()),
            ("keys nobody sees", _some(self.num_unseen_keys, self.unseen_keys)),
            ("pairs of some head", f"{self.num_pairs:,}"),
            ("coverage of a layer", f"{self.coverage:.2%} of {allowed}"),
            ("hops to all visible", self.hops_text),
            ("live range of a key", self._live_text()),
            ("decoding cache", cache_text),
            ("pairs grow like", self._growth_text()),
            *shown,
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<24}{value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{a}</th><td>{b}</td></tr>" for a, b in self.rows())
        return f"<table>{''.join(cells)}</table>".replace("<= q", "&lt;= q")

    def _causal_text(self) -> str:
        if self.offence is None:
            return "yes"
        head, q, k = self.offence
        return f"no: in head {head}, query {q:,} sees key {k:,}"

    def _empty_text(self) -> str:
        text = _some(self.num_empty_rows, self.empty_rows)
        shown = self.num_heads > 1 and self.num_empty_rows
        return f"{text} in head {self.worst_head}, which has most" if shown else text

    @property
    def hops_text(self) -> str:
        """The number of hops in words, as a range if it is not known exactly."""
        found = self.hops
        if found.least is None:
            return "never: some pair is out of reach at any depth"
        if found.exact:
            return f"{found.least:,}"
        if found.most is None:
            return f"at least {found.least:,} (no upper bound found)"
        return f"between {found.least:,} and {found.most:,}"

    def _live_text(self) -> str:
        used = self.last_use >= 0
        if not used.any():
            return "no key is used"
        steps = (self.last_use - np.arange(self.n))[used]
        return (
            f"last used {int(np.median(steps)):,} queries later (median), "
            f"{int(steps.max()):,} at most"
        )

    def _growth_text(self) -> str:
        if self.growth is None:
            return "not known: the map is made for this length, or n is below 64"
        return f"{self.growth} (fitted exponent {self.exponent:.2f})"


def properties(spec: Spec | str, n: int, num_heads: int = 1) -> Properties:
    """Finds causality, empty rows, coverage, hops, live ranges and growth of a map.

    Everything is exact, except the fitted ``growth``, and ``hops`` if ``hops.exact`` is
    False. For long sequences nothing of size ``n * n`` is built. A selection counts as
    if it chose all keys that it may choose.

    Args:
      spec: an index map, a term, or text.
      n: the number of queries, which is also the number of keys.
      num_heads: the number of heads; a multiple of the number that ``per_head`` needs.

    Raises:
      ValueError: the map reads run-time arrays, or is made for another length.
      NotImplementedError: no map describes the pairs of a part of the spec.

    Example:
      >>> import sadsl as sa
      >>> found = sa.properties(sa.causal() & sa.window(7), 64)
      >>> found.causal, found.num_pairs, found.hops.least, found.cache.size
      (True, 484, 9, 8)
    """
    seen = map_of(spec)
    node = widest(seen)
    maps, map_of_head = head_maps(node, n, num_heads)
    offence = first_offence(maps, map_of_head, n)
    causal = offence is None
    empty = [np.flatnonzero(first_and_last(m, ir.K, n)[0] < 0) for m in maps]
    worst = max(range(len(maps)), key=lambda m: len(empty[m]))
    last_use = np.stack([first_and_last(m, ir.Q, n)[1] for m in maps]).max(axis=0)
    unseen = np.flatnonzero(last_use < 0)
    union = simplify(ir.Or(maps))
    num_pairs = count_pairs(union, n, n)
    growth, exponent = fit_growth(node, n, num_heads)
    return Properties(
        n=n,
        num_heads=num_heads,
        causal=causal,
        offence=offence,
        worst_head=map_of_head.index(worst),
        num_empty_rows=len(empty[worst]),
        empty_rows=tuple(empty[worst][:8].tolist()),
        num_unseen_keys=len(unseen),
        unseen_keys=tuple(unseen[:8].tolist()),
        num_pairs=num_pairs,
        coverage=num_pairs / (n * (n + 1) // 2 if causal else n * n),
        hops=hops(union, n, causal=causal),
        last_use=last_use,
        cache=cache(Where(node), n, num_heads) if causal else None,
        growth=growth,
        exponent=exponent,
        selection_leak=declared_leak(seen),
    )


def fit_growth(
    node: ir.Pred, n: int, num_heads: int
) -> tuple[str | None, float | None]:
    """Fits how the number of pairs grows over n / 8, n / 4, n / 2 and n.

    The result is the name of the class and the slope in a log-log plot. For "n log n"
    the pairs per position rise by the same amount at every doubling, which tells it
    from a power of n.
    """
    fixed = any(isinstance(p, ir.Within | ir.Table) for p in ir.walk(node))
    if fixed or n < 8 * len(PARTS) * 2:
        return None, None
    lengths = np.array([n // part for part in PARTS])
    pairs = []
    for length in lengths.tolist():
        maps, map_of_head = head_maps(node, length, num_heads)
        each = [count_pairs(simplify(m), length, length) for m in maps]
        pairs.append(sum(each[m] for m in map_of_head))
    if not all(pairs):
        return None, None
    slope = float(np.polyfit(np.log(lengths), np.log(pairs), 1)[0])
    steps = np.diff(np.array(pairs) / lengths)
    rises = steps.min() > 0.02 * pairs[-1] / lengths[-1]
    if 1.03 < slope < 1.35 and rises and steps.max() < 1.25 * steps.min():
        return "n log n", slope
    nearest = min(NAMES, key=lambda exponent: abs(exponent - slope))
    near = abs(nearest - slope) < 0.12
    return NAMES[nearest] if near else f"n^{slope:.2f}", slope


def _some(count: int, first: tuple[int, ...]) -> str:
    if not count:
        return "none"
    shown = ", ".join(f"{x:,}" for x in first[:6])
    more = ", ..." if count > len(first[:6]) else ""
    return f"{count:,}: {shown}{more}"
