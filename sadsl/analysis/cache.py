"""``cache``: how many keys a decoder of a causal map must keep."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from lowering import ir
from lowering.expr import heads
from lowering.expr.simplify import simplify
from lowering.facts.first_and_last import first_and_last
from lowering.planning import BlockSizes, plan
from lowering.ranges import verify
from sadsl.run import checks
from sadsl.selections.base import widest
from sadsl.terms.base import Spec
from sadsl.text.specs import as_term


@dataclass(frozen=True, eq=False)
class Cache:
    """The keys and values that a decoder must keep, for ``n`` tokens.

    Step ``t`` computes the output of query ``t``, and key ``k`` must be in the cache
    for ``k <= t <= last_use[k]``. One cache serves all heads: a position is kept as
    long as some head needs it.

    Attributes:
      n: the number of tokens.
      size: the most positions that are needed at once; no cache can be smaller.
      pinned, slots: a simple cache: the first ``pinned`` positions stay for good, and a
        ring buffer of ``slots`` holds the last ones.
      last_use: the last query that sees each key, over all heads; -1 for none.
      size_by_map: the size that each distinct map needs by itself.
      map_of_head: the distinct map of each head, as an index.
      length_note: why the keys of a query depend on how many tokens follow; None if
        they do not.
    """

    n: int
    size: int
    pinned: int
    slots: int
    last_use: Int64[np.ndarray, " n"]
    size_by_map: tuple[int, ...]
    map_of_head: tuple[int, ...]
    length_note: str | None

    @property
    def kind(self) -> str:
        """How good a ring buffer is.

        "everything": no key can be dropped. "ring": the simple cache has the least
        size. "ring with waste": it is larger than the least size.
        """
        if self.size == self.n:
            return "everything"
        if self.pinned + self.slots == self.size:
            return "ring"
        return "ring with waste"

    def __str__(self) -> str:
        lines = [self._sentence()]
        if len(self.size_by_map) > 1:
            sizes = ", ".join(f"{x:,}" for x in self.size_by_map)
            lines.append(f"the distinct maps of the heads need {sizes} by themselves")
        if self.length_note:
            lines.append(f"the map depends on the length: {self.length_note}")
        return "\n".join(lines)

    def _sentence(self) -> str:
        of = f"{self.size:,} of {self.n:,} positions"
        if self.kind == "everything":
            return f"everything: nothing can be dropped before token {self.n:,}"
        parts = []
        if self.pinned:
            parts.append(f"the first {self.pinned:,} for good")
        if self.slots:
            parts.append(f"a ring of {self.slots:,}")
        ring = " and ".join(parts) or "nothing"
        if self.kind == "ring":
            return f"{of}: {ring}"
        held = self.pinned + self.slots
        more = "everything" if held == self.n else f"{held:,} ({ring})"
        return (
            f"{of} at once, if each is dropped after its last use; a ring buffer "
            f"would hold {more}"
        )


def cache(spec: Spec | str, n: int, num_heads: int = 1) -> Cache:
    """Finds the smallest cache that decodes a causal map, from its expression.

    For a map that content decides, the cache holds all keys that some content may
    choose.

    Args:
      spec: an index map, a term, or text; causal for ``n`` positions.
      n: the number of tokens, including the prompt.
      num_heads: the number of heads.

    Raises:
      ValueError: the map lets a query see a later key, or reads run-time arrays.

    Example:
      >>> import sadsl as sa
      >>> found = sa.cache(sa.causal() & (sa.window(7) | sa.sinks(2)), 100)
      >>> print(found)
      10 of 100 positions: the first 2 for good and a ring of 8
      >>> found.size, found.kind
      (10, 'ring')
    """
    return cache_of(widest(as_term(spec).map), n, num_heads)


def cache_of(node: ir.Pred, n: int, num_heads: int = 1) -> Cache:
    """``cache`` of an expression."""
    maps, map_of_head = head_maps(node, n, num_heads)
    offence = first_offence(maps, map_of_head, n)
    if offence is not None:
        head, q, k = offence
        raise ValueError(
            f"the map is not causal: in head {head}, query {q} sees key {k}, which is "
            "not there yet when it is decoded: use `causal() & map`"
        )
    uses = np.stack([last_use(m, n) for m in maps])
    last = uses.max(axis=0)
    pinned, slots = ring(last)
    return Cache(
        n=n,
        size=most_live(last),
        pinned=pinned,
        slots=slots,
        last_use=last,
        size_by_map=tuple(most_live(row) for row in uses),
        map_of_head=map_of_head,
        length_note=length_note(node, n, num_heads),
    )


def head_maps(
    node: ir.Pred, n: int, num_heads: int
) -> tuple[tuple[ir.Pred, ...], tuple[int, ...]]:
    """The distinct maps of the heads on ``n`` positions, and the map of each head.

    Raises:
      ValueError: they read run-time arrays, or are made for another length.
    """
    checks.positive({"n": n, "num_heads": num_heads})
    names = ir.operand_names(node)
    if names:
        raise ValueError(
            f"the map reads the run-time arrays {list(names)}, so its properties are "
            "not known without them: put constants in their place (blocks(size) for "
            "segments(), a number for an operand)"
        )
    every = heads.per_head(ir.substitute(node, {"n": ir.Const(n)}), num_heads)
    verify.verify(every, n, n)
    return heads.distinct(every)


def first_offence(
    maps: tuple[ir.Pred, ...], map_of_head: tuple[int, ...], n: int
) -> tuple[int, int, int] | None:
    """The first pair ``(head, q, k)`` with ``k > q``, by q, then k, then head; or None.

    Such a pair shows that the map is not causal.
    """
    found = []
    for m, node in enumerate(maps):
        later = ir.And((node, ir.Le(ir.Add(ir.Q, ir.Const(1)), ir.K)))
        least, _ = first_and_last(later, ir.K, n)
        if (least >= 0).any():
            q = int(np.argmax(least >= 0))
            found.append((q, int(least[q]), map_of_head.index(m)))
    if not found:
        return None
    q, k, head = min(found)
    return head, q, k


def last_use(node: ir.Pred, n: int) -> np.ndarray:
    """The last query that sees each key, int ``[n]``; -1 for none."""
    return first_and_last(node, ir.Q, n)[1]


def most_live(last: np.ndarray) -> int:
    """The most keys that are live at one step; key ``k`` lives in ``k .. last[k]``."""
    n = len(last)
    used = last >= 0
    starts = np.bincount(np.flatnonzero(used), minlength=n)
    stops = np.bincount(last[used] + 1, minlength=n + 1)[:n]
    return int(np.cumsum(starts - stops).max())


def ring(last: np.ndarray) -> tuple[int, int]:
    """The numbers of pinned positions and ring slots of the smallest such cache.

    Of several, the one with the fewest pinned positions.
    """
    n = len(last)
    life = np.where(last >= 0, last - np.arange(n) + 1, 0)
    longest = np.append(np.maximum.accumulate(life[::-1])[::-1], 0)
    pinned = int(np.argmin(np.arange(n + 1) + longest))
    return pinned, int(longest[pinned])


def length_note(node: ir.Pred, n: int, num_heads: int) -> str | None:
    """Why the keys of a query depend on how many tokens follow; None if they do not.

    A map on a grid exists for one length only. A map that reads the number of keys is
    compared, query by query, with itself at the length where the query is last.
    """
    for part in ir.walk(node):
        if isinstance(part, ir.Within):
            return (
                f"it is made for exactly {part.size:,} positions (a grid), and its "
                "rows are those of that length; decode with the whole length known"
            )
    if "n" not in ir.axes(node):
        return None
    now = ir.substitute(node, {"n": ir.Const(n)})
    then = ir.substitute(node, {"n": ir.Add(ir.Q, ir.Const(1))})
    differs = ir.Or((ir.And((now, ir.Not(then))), ir.And((then, ir.Not(now)))))
    seen = ir.And((differs, ir.Le(ir.K, ir.Q)))
    for head, part in enumerate(heads.per_head(seen, num_heads)):
        mask = plan((simplify(part),), (0,), BlockSizes(n, n, 64, 64), exact=True)
        if len(mask.run_start):
            return (
                f"in head {head}, a query sees other keys when it is the last token "
                f"than when {n:,} tokens are there; a prefill of another length is "
                "another map"
            )
    return None
