"""Plans agree with the dense mask: no pair is missed, no block is wrongly full."""

import itertools

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few
from planning_oracle import kinds_by_descent

import sadsl as sa
from lowering import pipeline, planning
from lowering.expr import heads
from lowering.ranges import refine
from lowering.ranges.quadtree import Tree
from lowering.ranges.ranges import Rectangles
from pallas_kernels.block_mask import EMPTY, FULL, PARTIAL, check, expand
from sadsl import catalog


def kinds_by_definition(pairs, block_q, block_kv):
    """The kind of every block, from all pairs ``[maps, q, k]``."""
    maps, q_len, kv_len = pairs.shape
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    pad = ((0, 0), (0, rows * block_q - q_len), (0, columns * block_kv - kv_len))
    shape = (maps, rows, block_q, columns, block_kv)
    some = np.pad(pairs, pad).reshape(shape).any(axis=(2, 4))
    # Padding queries do not spoil a full block; padding keys do.
    pad_q = (pad[0], pad[1], (0, 0))
    every = np.pad(np.pad(pairs, pad_q, constant_values=True), (pad[0], (0, 0), pad[2]))
    every = every.reshape(shape).all(axis=(2, 4))
    return np.where(some, np.where(every, FULL, PARTIAL), EMPTY)


def planned(
    spec, q_len, kv_len, block_q, block_kv, *, by="q", exact=False, num_heads=1
):
    stages = pipeline.run(spec.node, pipeline.Problem(q_len, kv_len, num_heads))
    mask = pipeline.block_mask(stages, block_q, block_kv, by, exact)
    check(mask)
    kinds = expand(mask)[np.asarray(mask.map_of_head)]
    return kinds if by == "q" else np.swapaxes(kinds, 1, 2)


def assert_sound(found, true, spec):
    assert not np.any((found == EMPTY) & (true != EMPTY)), f"missed pairs of {spec!r}"
    assert not np.any((found == FULL) & (true != FULL)), f"false full block of {spec!r}"


@pytest.mark.hypothesis
def test_random_maps():
    """Plans are sound, and under one percent of the blocks they visit are empty."""
    maps = visited = needless = 0

    @settings(max_examples=few(2000), suppress_health_check=list(HealthCheck))
    @given(
        strategies.SIZES,
        strategies.SIZES,
        strategies.composed(),
        strategies.BLOCKS,
        strategies.BLOCKS,
        st.sampled_from(["q", "kv"]),
    )
    def check_one(q_len, kv_len, spec, block_q, block_kv, by):
        nonlocal maps, visited, needless
        pairs = spec.dense(q_len, kv_len)
        true = kinds_by_definition(pairs, block_q, block_kv)
        found = planned(spec, q_len, kv_len, block_q, block_kv, by=by)
        assert_sound(found, true, spec)
        maps += 1
        visited += int((found != EMPTY).sum())
        needless += int(((found != EMPTY) & (true == EMPTY)).sum())
        plan = sa.plan(spec, q_len, kv_len, block_q=block_q, block_kv=block_kv)
        assert plan.num_pairs == pairs.sum()

    check_one()
    assert maps >= few(2000)
    assert needless <= 0.01 * visited


@settings(max_examples=few(150), suppress_health_check=list(HealthCheck))
@given(strategies.composed(), strategies.BLOCKS, strategies.BLOCKS)
def test_exact_plans_are_exact(spec, block_q, block_kv):
    true = kinds_by_definition(spec.dense(97, 97), block_q, block_kv)
    found = planned(spec, 97, 97, block_q, block_kv, exact=True)
    np.testing.assert_array_equal(found, true, err_msg=repr(spec))


@settings(max_examples=few(150), suppress_health_check=list(HealthCheck))
@given(strategies.composed(), strategies.BLOCKS)
def test_past_the_budget_plans_stay_sound(spec, block):
    true = kinds_by_definition(spec.dense(64, 64), block, block)
    node = heads.per_head(spec.node, 1)[0]
    at = Rectangles(*(np.array([x]) for x in (0, 63, 0, 63)))
    some, every = refine.settle(node, node, at, budget=0)
    assert some.all() or (true == EMPTY).all()
    assert not every.any() or (true == FULL).all()


NAMED = [
    sa.full(), sa.causal(), sa.window(20), sa.window(3, 9), sa.window(0), sa.sinks(5),
    sa.sinks(0), sa.keys(30, 75), sa.queries(11, 40), sa.strided(7), sa.strided(1),
    sa.dilated(3, 2, 5), sa.blocks(24), sa.blocks(7), sa.offsets({-3, 0, 1, 40}),
    sa.offsets(()), sa.causal().T, sa.window(1).lift(9),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("block", [8, 16, 40])
def test_named_maps_and_all_their_pairs_are_exact(block):
    specs = list(NAMED)
    for a, b in itertools.product(NAMED, repeat=2):
        specs += [a & b, a | b, a - b]
    for spec in specs:
        true = kinds_by_definition(spec.dense(97, 83), block, block)
        for by in ("q", "kv"):
            found = planned(spec, 97, 83, block, block, by=by)
            np.testing.assert_array_equal(found, true, err_msg=repr(spec))


@pytest.mark.parametrize("n", [1, 13, 130, 257, 1000])
@pytest.mark.parametrize("spec", NAMED, ids=repr)
def test_pairs_are_counted_exactly(spec, n):
    assert sa.plan(spec, n).num_pairs == spec.dense(n).sum()


def test_pairs_of_a_long_causal_map_have_a_closed_form():
    n = 1_000_003
    assert sa.plan(sa.causal(), n).num_pairs == n * (n + 1) // 2
    windowed = sa.plan(sa.causal() & (sa.window(511) | sa.sinks(64)), n)
    by_row = np.minimum(np.arange(1, n + 1), 512)
    extra = np.clip(np.arange(n) - 511, 0, 64)
    assert windowed.num_pairs == by_row.sum() + extra.sum()


@settings(max_examples=few(100), suppress_health_check=list(HealthCheck))
@given(strategies.with_heads(), st.sampled_from([6, 12]))
def test_heads_share_rows_and_keep_their_maps(spec, num_heads):
    pairs = spec.dense(48, 48, num_heads)
    found = planned(spec, 48, 48, 16, 16, num_heads=num_heads)
    true = kinds_by_definition(pairs, 16, 16)
    assert_sound(found, true, spec)
    plan = sa.plan(spec, 48, num_heads=num_heads)
    distinct = {p.tobytes() for p in pairs}
    assert len(distinct) <= plan.mask.num_maps <= 3


def test_equal_maps_of_heads_are_planned_once():
    spec = sa.per_head(sa.causal(), sa.causal() & sa.full(), sa.window(3), sa.causal())
    plan = sa.plan(spec, 256, num_heads=8)
    assert plan.mask.num_maps == 2
    np.testing.assert_array_equal(plan.mask.map_of_head, [0, 0, 0, 0, 1, 1, 0, 0])


def test_the_transposed_plan_lists_the_same_blocks():
    spec = sa.causal() & (sa.window(30) | sa.sinks(3) | sa.strided(50))
    stages = pipeline.run(spec.node, pipeline.Problem(300, 257))
    rows = pipeline.block_mask(stages, 32, 16, "q")
    columns = pipeline.block_mask(stages, 32, 16, "kv")
    turned = rows.transpose()
    for name in ("row_ptr", "run_start", "run_stop", "run_full"):
        np.testing.assert_array_equal(getattr(turned, name), getattr(columns, name))
    assert (turned.max_runs, turned.max_blocks) == (
        columns.max_runs,
        columns.max_blocks,
    )


def test_run_time_operands_leave_blocks_partial_and_static_parts_decide():
    spec = sa.causal() & (sa.segments() | sa.sinks(64))
    plan = sa.plan(spec, 256, block_q=64, block_kv=64)
    kinds = expand(plan.mask)[0]
    causal = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(kinds != EMPTY, causal)
    full = np.zeros((4, 4), bool)
    full[1:, 0] = True
    np.testing.assert_array_equal(kinds == FULL, full)
    with pytest.raises(ValueError, match="num_pairs depends on the run-time arrays"):
        _ = plan.num_pairs


def test_a_plan_of_a_million_tokens_is_small():
    plan = sa.plan(sa.causal(), 1 << 20)
    assert plan.nbytes < 1_000_000
    assert plan.num_runs == 2 * 8192 - 1


def simplified(spec, q_len, kv_len):
    """The one map of a spec, or None if it is made for other lengths."""
    try:
        stages = pipeline.run(spec.node, pipeline.Problem(q_len, kv_len))
    except ValueError:
        return None
    return stages["simplify"].maps[0]


def assert_as_by_descent(spec, sizes):
    node = simplified(spec, sizes.q_seq_len, sizes.kv_seq_len)
    if node is None:
        return
    wanted = kinds_by_descent(node, sizes)
    for by in ("q", "kv"):
        mask = planning.plan((node,), (0,), sizes, by=by, exact=True)
        check(mask)
        found = expand(mask)[0]
        found = found if by == "q" else found.T
        np.testing.assert_array_equal(found, wanted, err_msg=f"{spec!r} {sizes} {by}")
    counts = planning.count(node, sizes)
    assert counts == ((wanted != EMPTY).sum(), (wanted == PARTIAL).sum())


LENGTHS = st.sampled_from([1, 13, 37, 130, 300, 1000])


@pytest.mark.hypothesis
@settings(max_examples=few(1500), suppress_health_check=list(HealthCheck))
@given(LENGTHS, LENGTHS, strategies.composed(), strategies.BLOCKS, strategies.BLOCKS)
def test_equal_squares_have_equal_plans(q_len, kv_len, spec, block_q, block_kv):
    """Squares that are planned once hold what each would hold by itself."""
    sizes = planning.BlockSizes(q_len, kv_len, block_q, block_kv)
    if np.prod(sizes.num_blocks) < 1 << 16:
        assert_as_by_descent(spec, sizes)


GRID = sa.Grid(h=24, w=50)
REPEATING = {
    "sinks": sa.causal() & (sa.window(70) | sa.sinks(5) | sa.sinks(3).T),
    "strides": sa.causal() & (sa.window(64) | sa.strided(48)),
    "no power of two": sa.causal() & sa.window(300) & ~sa.blocks(100),
    "far apart": catalog.log_sparse(20),
    "grid": GRID.neighborhood((5, 7)),
    "strided grid": GRID.neighborhood((6, 10), stride=(2, 5), dilation=(2, 1)),
    "frames and text": catalog.radial(12, 96, text_tokens=48),
    "permuted": sa.window(40).permute([*range(0, 1200, 2), *range(1, 1200, 2)]),
    "random blocks": catalog.big_bird(75, 16),
    "segments": sa.causal() & (sa.segments() | sa.sinks(64) | sa.blocks(64)),
}


@pytest.mark.parametrize("block", [16, 24])
@pytest.mark.parametrize("name", REPEATING)
def test_maps_that_repeat_are_planned_as_by_descent(name, block):
    sizes = planning.BlockSizes(1200, 1200, block, 16)
    assert_as_by_descent(REPEATING[name], sizes)


@pytest.mark.parametrize(
    "spec",
    [
        sa.causal() & sa.strided(64),
        sa.causal() & (sa.window(8192) | sa.strided(1000)),
        sa.causal() & (sa.window(512) | sa.sinks(100)) & ~sa.blocks(300),
        catalog.log_sparse(),
        sa.Grid(t=64, h=128, w=128).neighborhood((5, 9, 9)),
    ],
    ids=repr,
)
def test_of_equal_squares_one_is_split(spec):
    """The tree stays small where 67 million blocks, or any row of them, would not."""
    n = 1 << 20
    sizes = planning.BlockSizes(n, n, 128, 128)
    tree = planning.squares(simplified(spec, n, n), sizes, exact=False)
    assert sum(len(level.kind) for level in tree.levels) < 3000


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        sa.causal() & (sa.window(90) | sa.strided(40)),
        sa.where(lambda q, k: (q * 7 + k * 5) % 31 == 0) | sa.sinks(40),
        sa.blocks(48) & sa.causal(),
    ],
    ids=repr,
)
def test_rows_are_the_same_from_whichever_level_they_are_joined(
    spec, across, monkeypatch
):
    sizes = planning.BlockSizes(500, 500, 8, 8)
    tree = planning.squares(simplified(spec, 500, 500), sizes, exact=True)
    usual = tree.rows(*sizes.num_blocks, across=across)
    for last in range(len(tree.levels)):
        monkeypatch.setattr(Tree, "_joint", lambda _, last=last: last)
        found = tree.rows(*sizes.num_blocks, across=across)
        np.testing.assert_array_equal(found.ptr, usual.ptr)
        np.testing.assert_array_equal(found.runs, usual.runs)


@pytest.mark.parametrize("period", [3, 12, 15, 17, 35, 46])
def test_squares_are_as_wide_as_a_period_that_is_no_power_of_two(period):
    """Plans stay the same, and the tree has a square of this width."""
    n, frame = 12 * 8 * period, 8 * period
    spec = sa.causal() & sa.where(
        lambda q, k: (q % frame - k % frame <= 5) & (q // frame - k // frame <= 2)
    )
    sizes = planning.BlockSizes(n, n, 8, 8)
    assert_as_by_descent(spec, sizes)
    tree = planning.squares(simplified(spec, n, n), sizes, exact=True)
    assert period in [level.size for level in tree.levels]


@pytest.mark.parametrize(
    ("name", "value"), [("q_seq_len", 0), ("block_q", 0), ("num_heads", -1)]
)
def test_bad_sizes(name, value):
    sizes = {"q_seq_len": 8, "kv_seq_len": 8, name: value}
    with pytest.raises(ValueError, match=f"{name}={value} must be an integer"):
        sa.plan(sa.causal(), **sizes)
