"""The derived cache against decoding that keeps only the live keys."""

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import ir
from sadsl.maps.symbols import Symbol

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

SUPPRESS = list(HealthCheck)


def last_uses(pairs):
    """By definition, from ``[heads, n, n]``: the last query that sees each key."""
    n = pairs.shape[-1]
    seen = pairs.any(axis=0)
    return np.array([max(np.flatnonzero(seen[:, k]), default=-1) for k in range(n)])


def decodes(pairs, capacity):
    """Whether a cache of ``capacity`` positions serves every pair, dropping the dead.

    A position that some later query needs must never be dropped, so it is a matter of
    the most positions at once.
    """
    last, held = last_uses(pairs), set()
    for t in range(pairs.shape[-1]):
        held = {k for k in held if last[k] >= t}
        if last[t] >= t:
            held.add(t)
        if len(held) > capacity:
            return False
        assert set(np.flatnonzero(pairs[:, t].any(axis=0))) <= held
    return True


def ring_serves(pairs, pinned, slots):
    """Whether the first positions and the last few serve every pair."""
    t, k = np.nonzero(pairs.any(axis=0))
    return bool(((k < pinned) | (k > t - slots)).all())


def check(spec, n, num_heads=1):
    pairs = spec.dense(n, num_heads=num_heads)
    found = sa.cache(spec, n, num_heads)
    np.testing.assert_array_equal(found.last_use, last_uses(pairs))
    assert decodes(pairs, found.size)
    assert found.size == 0 or not decodes(pairs, found.size - 1)
    assert ring_serves(pairs, found.pinned, found.slots)
    held = found.pinned + found.slots
    assert held >= found.size
    split = [(p, s) for p in range(n + 1) for s in range(n + 1 - p)]
    assert held == min(p + s for p, s in split if ring_serves(pairs, p, s))
    ring = "ring" if held == found.size else "ring with waste"
    assert found.kind == ("everything" if found.size == n else ring)
    for m, size in enumerate(found.size_by_map):
        head = pairs[found.map_of_head.index(m)][None]
        assert decodes(head, size)
        assert size == 0 or not decodes(head, size - 1)
    return found


@settings(max_examples=few(60), suppress_health_check=SUPPRESS)
@given(strategies.composed(4), st.sampled_from([1, 2, 7, 13, 24]))
def test_random_causal_maps(spec, n):
    check(sa.causal() & spec, n)


@settings(max_examples=few(20), suppress_health_check=SUPPRESS)
@given(strategies.with_heads(), st.sampled_from([1, 7, 13]))
def test_random_maps_by_head(spec, n):
    check(spec & sa.causal(), n, num_heads=6)


@pytest.mark.parametrize(
    ("spec", "size", "pinned", "slots", "kind"),
    [
        (sa.causal(), 40, 0, 40, "everything"),
        (sa.window(5), 6, 0, 6, "ring"),
        (sa.causal() & (sa.window(5) | sa.sinks(3)), 9, 3, 6, "ring"),
        (sa.causal() & sa.blocks(8), 8, 0, 8, "ring"),
        (sa.dilated(3, 0, 4), 13, 0, 13, "ring"),
        (sa.causal() & sa.strided(4), 37, 0, 37, "ring"),
        (sa.causal() & (sa.window(2) | sa.keys(10, 14)), 7, 14, 3, "ring with waste"),
        (sa.causal() & sa.sinks(3), 3, 3, 0, "ring"),
        (sa.offsets({0, 7}), 8, 0, 8, "ring"),
        (sa.causal() - sa.causal(), 0, 0, 0, "ring"),
    ],
)
def test_sizes(spec, size, pinned, slots, kind):
    found = check(spec, 40)
    assert (found.size, found.pinned, found.slots) == (size, pinned, slots)
    assert found.kind == kind


def test_what_it_says():
    of = "of 40 positions"
    sinks = sa.causal() & (sa.window(5) | sa.sinks(3))
    assert str(sa.cache(sinks, 40)) == f"9 {of}: the first 3 for good and a ring of 6"
    assert str(sa.cache(sa.causal(), 40)) == (
        "everything: nothing can be dropped before token 40"
    )
    middle = sa.causal() & (sa.window(2) | sa.keys(10, 14))
    assert str(sa.cache(middle, 40)) == (
        f"7 {of} at once, if each is dropped after its last use; a ring buffer would "
        "hold 17 (the first 14 for good and a ring of 3)"
    )
    assert str(sa.cache("window(5)", 40)) == f"6 {of}: a ring of 6"
    assert str(sa.cache(sa.softmax(sa.causal() - sa.causal()), 40)) == (
        f"0 {of}: nothing"
    )
    two = sa.per_head(sa.window(5), sa.window(9))
    assert "need 6, 10 by themselves" in str(sa.cache(two, 40, num_heads=4))


def test_long_sequences():
    spec = sa.causal() & (sa.window(512) | sa.sinks(4))
    found = sa.cache(spec, 1 << 18)
    assert (found.size, found.pinned, found.slots) == (517, 4, 513)


def test_a_map_that_is_not_causal():
    with pytest.raises(ValueError, match="in head 0, query 3 sees key 5") as error:
        sa.cache(sa.causal() | (sa.queries(3, 9) & sa.keys(5, 7)), 40)
    assert "use `causal() & map`" in str(error.value)
    with pytest.raises(ValueError, match="in head 2, query 0 sees key 1"):
        sa.cache(sa.per_head(sa.causal(), sa.window(0, 1)), 40, num_heads=4)


def test_maps_that_depend_on_the_length():
    assert sa.cache(sa.window(5), 40).length_note is None
    grid = sa.Grid(x=6).neighborhood(3, stride=3, causal=True)
    assert "made for exactly 6 positions" in sa.cache(grid, 6).length_note
    near_end = sa.causal() & sa.where(lambda q, k: k >= Symbol(ir.N) - 9)
    assert "head 0, a query sees other keys" in sa.cache(near_end, 40).length_note
    assert "depends on the length" in str(sa.cache(near_end, 40))
    # This one reads the length, as all compositions do, and yet its rows are fixed.
    twice = sa.window(2) @ sa.window(3)
    assert sa.cache(twice, 40).length_note is None
    ahead = sa.causal() & (sa.window(0, 3) @ sa.offsets({3}))
    rows = [ahead.dense(n)[0][n - 1] for n in range(1, 9)]
    long = ahead.dense(40)[0]
    assert any((row != long[i, : i + 1]).any() for i, row in enumerate(rows))
    assert "depends on the length" in str(sa.cache(ahead, 40))


@pytest.mark.parametrize(
    ("spec", "n", "num_heads", "message"),
    [
        (sa.segments(), 9, 1, "reads the run-time arrays"),
        (sa.causal(), 0, 1, "n=0 must be an integer of at least 1"),
        (sa.causal(), 3, 0, "num_heads=0 must be an integer of at least 1"),
        (sa.Grid(x=6).axial("x"), 9, 1, "a grid"),
        (sa.per_head(sa.causal(), sa.full()), 9, 3, "do not divide 3 heads"),
    ],
)
def test_mistakes(spec, n, num_heads, message):
    with pytest.raises(ValueError, match=message):
        sa.cache(spec, n, num_heads)
