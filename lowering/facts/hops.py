"""Counts the layers of a map that every query needs until it depends on every key.

One layer is one hop. Maps of ``q - k`` alone are solved on differences, products axis
by axis, short sequences pair by pair. All others are bounded on blocks: blocks with
some pair give a lower bound, blocks with all pairs an upper one. A key that is
reached in fewer hops counts as reached, since residual streams keep it.
"""

from math import prod

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import simplify
from lowering.facts.block_hops import hops_of_blocks, special_cuts
from lowering.facts.count_pairs import count_on_diagonals
from lowering.facts.doubling import Doubling, Hops, exact, on_pairs, search, shares
from lowering.solve.by_axis import factors
from lowering.solve.eliminate import known

# Sequences up to this length are solved pair by pair.
SHORT = 2048
# Products are solved if no axis is longer than this.
LONGEST_AXIS = 1024
# At most so many keys at the start may be visible to all queries.
MOST_FIRST = 256


def hops(node: ir.Pred, n: int, *, causal: bool) -> Hops:
    """The hops of a map over ``n`` positions; heads are united and ``n`` is resolved.

    Args:
      node: a predicate of ``q`` and ``k``, in normal form.
      n: the number of queries, and of keys.
      causal: whether the map is causal: then all pairs with ``k <= q`` are to be
        reached, else all pairs.
    """
    found: Hops | None
    if count_on_diagonals(node, n, n) is not None:
        found = _on_differences(node, n, causal=causal)
    else:
        found = _after_first(node, n) if causal else _by_axis(node, n)
    if found is not None and found.exact:
        return found
    if n <= SHORT:
        return exact(*search(on_pairs(_dense(node, n), causal=causal)))
    return found or hops_of_blocks(node, n, causal=causal)


def _by_axis(node: ir.Pred, n: int) -> Hops | None:
    """The hops of a product of maps of axes: those of its slowest factor, or None.

    Each factor must select every position as its own key: then so does the product.
    """
    axes = factors(node, n)
    if axes is None or max(size for _, size in axes) > LONGEST_AXIS:
        return None
    dense = [_dense(part, size) for part, size in axes]
    if not all(pairs.diagonal().all() for pairs in dense):
        return None
    found = [exact(*search(on_pairs(pairs, causal=False))) for pairs in dense]
    if any(f.least is None for f in found):
        return Hops(None, None, ())
    most = max(f.least or 1 for f in found)
    depths = sorted({d for f in found for d, _, _ in f.reach})
    # At a depth that was not searched, the bounds of its neighbours hold.
    low = [prod(_bounds_at(f, d)[0] for f in found) for d in depths]
    high = [prod(_bounds_at(f, d)[1] for f in found) for d in depths]
    return Hops(most, most, tuple(zip(depths, low, high, strict=True)))


def _bounds_at(found: Hops, depth: int) -> tuple[float, float]:
    """The least and the greatest share of reached pairs at a depth."""
    low = max((s for d, s, _ in found.reach if d <= depth), default=0.0)
    return low, min((s for d, _, s in found.reach if d >= depth), default=1.0)


def _after_first(node: ir.Pred, n: int) -> Hops | None:
    """The hops of a causal map that is of ``q - k`` after some first keys, or None.

    All queries reach the first keys. Paths only go to earlier positions, so positions
    before a key never help to reach it.
    """
    # Also try one key more: all later queries may see the key at the border.
    firsts = {c + i for c in special_cuts(node, n) for i in (0, 1)}
    for first in sorted(c for c in firsts if c <= MOST_FIRST and c < n):
        at: ir.Expr = ir.Const(first)
        rest = ir.substitute(node, {"q": ir.Add(ir.Q, at), "k": ir.Add(ir.K, at)})
        rest = known(simplify(rest))
        if count_on_diagonals(rest, 1, 1) is None:
            continue
        bounds = _hops_to_first(node, n, first)
        if bounds is None:
            continue
        among, extra = bounds
        found = _on_differences(rest, n - first, causal=True)
        inside = (n - first) * (n - first + 1) / (n * (n + 1))
        reach = tuple(
            (d, low * inside + (1 - inside) * (d >= extra), high * inside + 1 - inside)
            for d, low, high in found.reach
        )
        if found.least is None or found.most is None:
            return Hops(found.least, None, reach)
        return Hops(max(found.least, among), max(found.most, extra), reach)
    return None


def _hops_to_first(node: ir.Pred, n: int, first: int) -> tuple[int, int] | None:
    """Bounds of the hops from any query to the first keys of a causal map, or None."""
    q, k = np.arange(n)[:, None], np.arange(first)[None, :]
    held = evaluate(node, NumPy(q, k)) | (k > q)
    if held.all():
        return 1, 1
    if not held[:, -1].all():
        return None
    # All queries see the last of these keys, from which paths continue among them.
    among, _ = search(on_pairs(_dense(node, first), causal=True))
    return None if among is None else (among, among + 1)


def _on_differences(node: ir.Pred, n: int, *, causal: bool) -> Hops:
    """The hops of a map of ``q - k``: a path is a sum of differences.

    Borders do not matter to a path that only goes down, or only up: this bounds the
    hops from above. Paths that may leave the sequence bound them from below.
    """
    d = np.arange(1 - n, n)
    q = np.maximum(d, 0)[:, None]
    held = np.broadcast_to(evaluate(node, NumPy(q, q - d[:, None])), (2 * n - 1, 1))
    held = held[:, 0] | (d == 0)
    down, up = held[n - 1 :], held[n - 1 :: -1]
    weight = (n - np.arange(n)) / n
    ways = (down,) if causal else (down, up)
    one_way = [search(_on_sums(x, weight, 0)) for x in ways]
    if causal:
        return exact(*one_way[0])
    both = np.concatenate([weight[:0:-1], weight])
    least, upper = search(_on_sums(held, both, n - 1))
    if least is None:
        return Hops(None, None, shares({}, upper, 0.0))
    counts = [count for count, _ in one_way]
    if None in counts:
        return Hops(least, None, shares({}, upper, 0.0))
    most = max(count for count in counts if count is not None)
    return Hops(least, most, shares({most: 1.0}, upper, 0.0))


def _on_sums(start: np.ndarray, weight: np.ndarray, zero: int) -> Doubling:
    """The search on sets of differences, bool arrays; ``start[zero]`` is difference 0.

    The sums of two sets are the support of a convolution, computed by FFT.
    """
    count = len(start)
    width = 1 << (2 * count).bit_length()

    def join(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> tuple:
        first, second = (np.fft.rfft(x[0].astype(np.float64), width) for x in (a, b))
        return (np.fft.irfft(first * second, width)[zero : zero + count] > 0.5,)

    return Doubling(
        start=(start,),
        join=join,
        done=lambda state: bool(state[0].all()),
        share=lambda state: float(weight[state[0]].sum() / weight.sum()),
    )


def _dense(node: ir.Pred, n: int) -> np.ndarray:
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return np.broadcast_to(evaluate(node, NumPy(q, k)), (n, n))
