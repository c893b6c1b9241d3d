"""Properties against their definitions on dense maps, and against mutated maps."""

import math

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import ir
from lowering.expr.simplify import simplify
from lowering.facts import block_hops, hops
from sadsl import plot
from sadsl.analysis.properties import NAMES

SUPPRESS = list(HealthCheck)


def hops_by_definition(seen, causal):
    """Hops and the share of visible pairs after each, by repeated multiplication."""
    n = len(seen)
    visible = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    step = seen | np.eye(n, dtype=bool)
    reached, shares = step, []
    while True:
        shares.append((reached & visible).sum() / visible.sum())
        if (reached | ~visible).all():
            return len(shares), shares
        further = (reached.astype(int) @ step.astype(int)) > 0
        if (further == reached).all():
            return None, shares
        reached = further


def check(spec, n, num_heads=1):
    """Everything against the dense map."""
    pairs = spec.dense(n, num_heads=num_heads)
    found = sa.properties(spec, n, num_heads)
    later = [
        (q, k, h) for h, q, k in zip(*np.nonzero(pairs), strict=True) if k > q
    ]  # fmt: skip
    assert found.causal == (not later)
    if later:
        q, k, h = min(later)
        assert found.offence == (h, q, k)
        assert found.cache is None
    else:
        assert found.offence is None
        assert found.cache.size == sa.cache(spec, n, num_heads).size
    empty = [np.flatnonzero(~head.any(axis=1)) for head in pairs]
    assert found.num_empty_rows == max(map(len, empty))
    assert found.empty_rows == tuple(empty[found.worst_head][:8])
    assert len(empty[found.worst_head]) == found.num_empty_rows
    seen = pairs.any(axis=0)
    unseen = np.flatnonzero(~seen.any(axis=0))
    assert found.num_unseen_keys == len(unseen)
    assert found.unseen_keys == tuple(unseen[:8])
    last = np.where(seen.any(axis=0), n - 1 - seen[::-1].argmax(axis=0), -1)
    np.testing.assert_array_equal(found.last_use, last)
    assert found.num_pairs == seen.sum()
    allowed = n * (n + 1) // 2 if found.causal else n * n
    assert found.coverage == seen.sum() / allowed
    expected, shares = hops_by_definition(seen, found.causal)
    assert found.hops.exact
    assert found.hops.least == expected
    check_reach(found.reach_by_depth, shares)
    return found


def check_reach(reach, shares):
    depths = [depth for depth, _, _ in reach]
    assert depths == sorted(set(depths))
    for depth, least, most in reach:
        share = shares[min(depth, len(shares)) - 1]
        assert least - 1e-9 <= share <= most + 1e-9


@settings(max_examples=few(60), suppress_health_check=SUPPRESS)
@given(strategies.with_heads(), st.sampled_from([1, 2, 7, 13, 48]), st.booleans())
def test_random_maps(spec, n, causal):
    check(sa.causal() & spec if causal else spec, n, num_heads=6)


@settings(max_examples=few(80), suppress_health_check=SUPPRESS)
@given(
    strategies.composed(4),
    strategies.SIZES,
    st.booleans(),
    st.sampled_from([1, 4, 16, 512]),
    st.sampled_from([0, 1 << 28]),
)
def test_hops_without_a_dense_map(spec, n, causal, most_blocks, most_pairs):
    """The methods for long sequences, at lengths that the definition can do."""
    spec = sa.causal() & spec if causal else spec
    node = simplify(ir.substitute(spec.node, {"n": ir.Const(n)}))
    seen = spec.dense(n)[0]
    causal = not np.triu(seen, 1).any()
    expected, shares = hops_by_definition(seen, causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hops, "SHORT", 0)
        patch.setattr(block_hops, "MOST_BLOCKS", most_blocks)
        patch.setattr(block_hops, "MOST_PAIRS", most_pairs)
        found = hops.hops(node, n, causal=causal)
    if expected is None:
        assert found.least is None or found.most is None
    else:
        assert found.least is not None
        assert found.least <= expected
        assert found.most is None or found.most >= expected
    check_reach(found.reach, shares)


NEAR = sa.causal() & sa.window(20)
LONG = [
    (sa.causal(), 1),
    (NEAR, 205),
    (NEAR | sa.causal() & sa.sinks(4), 205),
    (sa.causal() & (sa.window(1) | sa.keys(3, 9)), 4086),
    (sa.causal() & (sa.strided(64) | sa.window(63)), 2),
    (sa.causal() & sa.strided(4), None),
    (sa.window(3, 3), 1365),
    (sa.window(64, 64) | sa.sinks(64) | sa.queries(0, 64), 2),
    (sa.causal() & (sa.window(1).lift(32) | sa.sinks(32)), 126),
    (sa.blocks(32) | sa.keys(0, 32) | sa.queries(0, 32), 2),
    # Slow within its blocks only.
    (sa.causal() & (sa.where(lambda q, k: k // 32 < q // 32) | sa.window(1)), 31),
    (sa.Grid(h=64, w=64).neighborhood(7), 20),
    (sa.Grid(h=64, w=64).axial("h") | sa.Grid(h=64, w=64).axial("w"), 2),
]


@pytest.mark.parametrize(("spec", "expected"), LONG, ids=lambda x: repr(x)[:60])
def test_hops_of_long_sequences(spec, expected):
    found = sa.properties(spec, 4096).hops
    assert found.exact
    assert found.least == expected


def test_a_slow_start():
    """All keys from the 48th on are seen at once; the ones before, one by one."""
    spec = sa.causal() & (~sa.sinks(49) | sa.keys(48, 49) | sa.window(1))
    assert hops_by_definition(spec.dense(130)[0], causal=True)[0] == 49
    found = sa.properties(spec, 4096).hops
    assert (found.least, found.most) == (48, 49)


def test_power_attention():
    """Every past token within ceil(log2(blocks)) layers."""
    for n, block in ((64, 1), (1024, 16), (4096, 32)):
        apart = sa.where(lambda q, k: sa.power_of_two(q - k))
        spec = sa.causal() & (apart | sa.window(1) | sa.sinks(1)).lift(block)
        found = sa.properties(spec, n)
        assert found.hops.exact
        assert found.hops.least <= math.ceil(math.log2(n // block))
        if n == 64:
            assert found.hops.least == 5
            row = np.flatnonzero(spec.dense(n)[0][13])
            assert row.tolist() == [0, 5, 9, 11, 12, 13]
    # What the layers buy: without the powers it is a window with sinks.
    assert sa.properties(sa.causal() & (sa.window(1) | sa.sinks(1)), 64).hops.least > 6


GOOD = sa.causal() & (sa.window(6) | sa.sinks(2))
MUTANTS = [
    ("a key too late", sa.where(lambda q, k: k <= q + 1), sa.causal()),
    ("a key too early", sa.where(lambda q, k: k < q), sa.causal()),
    ("a hole in the window", GOOD - sa.offsets({3}), GOOD),
    ("no own key", GOOD - sa.offsets({0}), GOOD),
    ("sinks are missing", sa.causal() & sa.window(6), GOOD),
    ("a window too short", sa.causal() & (sa.window(5) | sa.sinks(2)), GOOD),
    ("a key that nobody sees", GOOD - sa.keys(9, 10), GOOD),
    ("one query is blind", GOOD - sa.queries(9, 10), GOOD),
    ("a head looks ahead", sa.per_head(GOOD, GOOD.T), sa.per_head(GOOD, GOOD)),
    ("a stride off by one", sa.causal() & sa.strided(5), sa.causal() & sa.strided(4)),
]


@pytest.mark.parametrize(
    ("mutant", "good"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS]
)
def test_mutants_are_seen(mutant, good):
    reports = []
    for spec in (mutant, good):
        found = check(spec, 65, num_heads=2)
        reports.append(str(found))
    assert reports[0] != reports[1]


def test_what_it_says():
    text = str(sa.properties("causal() & (window(6) | sinks(2))", 4096, 2))
    assert text == "\n".join(
        [
            "positions, heads        4,096, 2",
            "causal                  yes",
            "queries without a key   none",
            "keys nobody sees        none",
            "pairs of some head      36,828",
            "coverage of a layer     0.44% of k <= q",
            "hops to all visible     683",
            "live range of a key     last used 6 queries later (median), 4,095 at most",
            "decoding cache          9 of 4,096 positions: the first 2 for good and a "
            "ring of 7",
            "pairs grow like         n (fitted exponent 1.00)",
        ]
    )
    blind = sa.softmax(sa.per_head(sa.full(), sa.full() - sa.queries(3, 20)))
    found = sa.properties(blind, 65, 4)
    assert "17: 3, 4, 5, 6, 7, 8, ... in head 2, which has most" in str(found)
    assert "no: in head 0, query 0 sees key 1" in str(found)
    assert "<th>causal</th>" in found._repr_html_()
    assert "k &lt;= q" in sa.properties(sa.causal(), 9)._repr_html_()
    with pytest.raises(AttributeError):
        found.n = 3
    assert "never" in str(sa.properties(sa.blocks(8), 65))
    nothing = str(sa.properties(~sa.full(), 65))
    assert "no key is used" in nothing


def test_bounds_are_said_to_be_bounds():
    spec = sa.causal() & sa.where(lambda q, k: (k >= q - 40 - q // 64) & (q % 3 > 0))
    report = sa.properties(spec | sa.offsets({0, 1}), 4096)
    assert not report.hops.exact
    most = report.hops.most
    least = f"{report.hops.least:,}"
    bounds = f"at least {least} (no upper" if most is None else f"between {least} and"
    assert bounds in str(report)


@pytest.mark.parametrize(
    ("spec", "growth"),
    [
        (sa.causal(), "n^2"),
        (sa.causal() & sa.window(9), "n"),
        (sa.causal() & sa.strided(8), "n^2"),
        (sa.causal() & sa.where(lambda q, k: sa.power_of_two(q - k)), "n log n"),
        (sa.where(lambda q, k: k <= q // 4), "n^2"),
        (sa.queries(0, 1) & sa.keys(0, 1), "1"),
        (sa.Grid(h=64, w=32).axial("h"), None),
        (sa.causal().permute(range(2048)), None),
    ],
)
def test_growth(spec, growth):
    found = sa.properties(spec, 2048)
    assert found.growth == growth
    if growth in NAMES.values():
        assert abs(found.exponent - {v: e for e, v in NAMES.items()}[growth]) < 0.12


def test_growth_of_short_sequences_is_not_guessed():
    assert sa.properties(sa.causal(), 13).growth is None


@pytest.mark.parametrize(
    ("spec", "n", "message"),
    [
        (sa.segments(), 9, "put constants in their place"),
        (sa.where(lambda q, k: k < sa.operand("stop")), 9, r"arrays \['stop'\]"),
        (sa.Grid(x=6).axial("x"), 9, "a grid"),
        (sa.causal(), -3, "n=-3 must be an integer"),
    ],
)
def test_mistakes(spec, n, message):
    with pytest.raises(ValueError, match=message):
        sa.properties(spec, n)


def test_picture():
    ax = plot.reach(sa.properties(sa.causal() & sa.window(3), 65))
    assert "hops: 22" in ax.get_title()
    depth, share = ax.lines[0].get_data()
    assert depth[0] == 1
    assert share.max() == 1
